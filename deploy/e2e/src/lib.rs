//! End-to-end tests with the real binaries, and the rules of the house. Everything is in `tests/`.
