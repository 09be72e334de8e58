//! Facts as text: addresses as 0x-prefixed hexadecimal numbers, other numbers in decimal, the rest as it is printed.

use iommu_types::{DeviceAddress, Direction, DomainId, Gpa, Iova, Owner};

use super::FACT_BYTES_MAX;

/// A field of a fact.
pub(super) trait FactText: Sized {
    fn to_text(&self) -> String;
    fn from_text(text: &str) -> Option<Self>;
}

/// `text`, cut at [`FACT_BYTES_MAX`] bytes.
pub(crate) fn bounded(text: &str) -> String {
    let mut end = text.len().min(FACT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).expect("the end is a character boundary within the text").to_owned()
}

macro_rules! printed {
    ($($ty:ty),*) => { $(
        impl FactText for $ty {
            fn to_text(&self) -> String {
                self.to_string()
            }
            fn from_text(text: &str) -> Option<Self> {
                text.parse().ok()
            }
        }
    )* };
}

printed!(u8, u16, u32, u64, DeviceAddress, Owner);

impl FactText for String {
    fn to_text(&self) -> String {
        bounded(self)
    }
    fn from_text(text: &str) -> Option<Self> {
        Some(text.to_owned())
    }
}

impl FactText for DomainId {
    fn to_text(&self) -> String {
        self.to_string()
    }
    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok().map(Self::new)
    }
}

macro_rules! addresses {
    ($($ty:ty),*) => { $(
        impl FactText for $ty {
            fn to_text(&self) -> String {
                format!("{:#x}", self.get())
            }
            fn from_text(text: &str) -> Option<Self> {
                // `from_str_radix` would take a sign as well.
                let digits = text.strip_prefix("0x").filter(|digits| !digits.starts_with('+'))?;
                u64::from_str_radix(digits, 16).ok().map(Self::new)
            }
        }
    )* };
}

addresses!(Iova, Gpa);

impl FactText for Direction {
    fn to_text(&self) -> String {
        self.to_string()
    }
    fn from_text(text: &str) -> Option<Self> {
        [Self::Bidirectional, Self::ToDevice, Self::FromDevice]
            .into_iter()
            .find(|direction| direction.to_string() == text)
    }
}
