//! The wire contract: schema, generated code, conversions, errors.
