#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shortkit_webhooks_fuzz::entry::rest_uri(data));
