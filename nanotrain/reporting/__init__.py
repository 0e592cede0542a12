"""What the report and the watch are made of: recorded history, verdicts, charts, the page."""
