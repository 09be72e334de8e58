//! Builds and starts the real binaries.
