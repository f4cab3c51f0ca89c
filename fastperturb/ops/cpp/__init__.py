"""The ops in C++, compiled on first use."""
