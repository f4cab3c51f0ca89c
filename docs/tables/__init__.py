"""Tables of measured numbers in README.md and docs/, written from the JSON under bench/results."""
