//! What host software does: domains, IOVA allocation, DMA mapping, ownership, topology.
