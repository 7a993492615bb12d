"""What the subcommands of `nibble` do, one file each; `cluster/cli/` parses their arguments."""
