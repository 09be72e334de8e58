//! End-to-end tests with the real binaries, and the house rules.
