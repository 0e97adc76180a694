//! A stock Linux kernel under `blockhouse run`.
