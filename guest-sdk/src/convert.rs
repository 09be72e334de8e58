//! From answers to types: what does not parse is the server's fault and is told as such.

use iommu_types::DomainId;

use crate::TransportError;

/// An answer that does not parse.
pub(crate) fn bad_answer(error: impl std::fmt::Display) -> TransportError {
    TransportError::BadAnswer(error.to_string())
}

/// A domain identifier of 16 bits.
pub(crate) fn domain_id(raw: u32) -> Result<DomainId, TransportError> {
    let number =
        u16::try_from(raw).map_err(|_| bad_answer(format!("domain_id: {raw} needs more than 16 bits")))?;
    Ok(DomainId::new(number))
}
