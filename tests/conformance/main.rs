//! Every format against its reference implementation.
