//! A PCI copy engine as a device agent.
