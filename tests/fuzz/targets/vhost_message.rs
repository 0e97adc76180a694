//! See `blockhouse_fuzz`.
#![cfg_attr(fuzzing, no_main)]

blockhouse_fuzz::program!("vhost_message");
