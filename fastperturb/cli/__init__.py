"""The command line: `fastperturb COMMAND`."""
