"""How fast it is, always beside something else measured in the same run: ``python -m benchmarks`` prints the table."""
