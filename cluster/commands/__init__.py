"""What the subcommands of `nibble` do, one file each; `cluster/cli.py` parses their arguments."""
