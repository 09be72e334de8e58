//! Bit layouts of VT-d 5.10, one file per kind. CONTRACT (helper C): plain data, no behaviour beyond encode/decode.
