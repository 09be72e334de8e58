//! The IOMMU as a network service.
