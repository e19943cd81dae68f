"""Plans: lowered programs, memory and time of machines that have a name."""
