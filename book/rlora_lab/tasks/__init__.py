"""The suites of tasks: strings and sentences."""
