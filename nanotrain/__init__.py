"""nanotrain: a performance-first LLM training engine. Import what you need from its modules; nothing is imported here."""
