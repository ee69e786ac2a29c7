#![no_main]

use libfuzzer_sys::fuzz_target;
use nats_webhook_relay::fuzzing;

fuzz_target!(|file: &str| fuzzing::dotenv(file));
