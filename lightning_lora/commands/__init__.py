"""One file per subcommand: its arguments, which need no import that takes time, and what it runs, which may."""
