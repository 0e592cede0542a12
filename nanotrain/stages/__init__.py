"""One file per stage of the road; `nanotrain <stage> --help` lists its keys."""
