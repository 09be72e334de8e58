//! The enums of the operations: each variant goes the way of its fact.

use std::collections::HashMap;

use iommu_types::errors::*;
use iommu_types::{InvalidRange, for_each_operation};
use tonic::Code;
use tonic_types::ErrorDetails;

use super::WireError;
use crate::model::{InvalidBatch, InvalidRequest};

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident { $($variant:ident),* $(,)? })*) => { $(
        impl WireError for $name {
            fn reason(&self) -> &'static str {
                match self { $(Self::$variant(fact) => fact.reason()),* }
            }
            fn code(&self) -> Code {
                match self { $(Self::$variant(fact) => fact.code()),* }
            }
            fn metadata(&self) -> HashMap<String, String> {
                match self { $(Self::$variant(fact) => fact.metadata()),* }
            }
            fn details(&self) -> ErrorDetails {
                match self { $(Self::$variant(fact) => fact.details()),* }
            }
            fn from_reason(reason: &str, metadata: &HashMap<String, String>) -> Option<Self> {
                $(
                    if let Some(fact) = $variant::from_reason(reason, metadata) {
                        return Some(Self::$variant(fact));
                    }
                )*
                None
            }
        }
    )* };
}

for_each_operation!(operations
    InvalidRequest { InvalidField, InvalidRange }
    InvalidBatch { InvalidField, LimitReached }
);
