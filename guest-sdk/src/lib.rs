//! Async clients: Driver (DMA API), Observer, Operator, bare machines.
