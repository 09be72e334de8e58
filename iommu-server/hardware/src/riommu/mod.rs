//! stub
pub mod spec;
