#![no_main]

use libfuzzer_sys::fuzz_target;
use nats_webhook_relay::fuzzing;

fuzz_target!(
    |input: (Vec<(String, String)>, &[u8], &str, u16)| fuzzing::headers(
        &input.0, input.1, input.2, input.3
    )
);
