//! What a scenario found, printed as it is found.

use serde_json::{Value, json};

/// What somebody's deliveries took.
#[derive(Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) count: usize,
    pub(crate) lost: usize,
}

impl Latency {
    /// The medians of what several measurements found.
    pub(crate) fn median(of: &[Self]) -> Self {
        let median = |figure: fn(&Self) -> f64| {
            let mut values: Vec<f64> = of.iter().map(figure).collect();
            values.sort_by(f64::total_cmp);
            let middle = values.len() / 2;
            if values.len().is_multiple_of(2) {
                f64::midpoint(values[middle - 1], values[middle])
            } else {
                values[middle]
            }
        };
        Self {
            p50_ms: median(|latency| latency.p50_ms),
            p99_ms: median(|latency| latency.p99_ms),
            count: of.iter().map(|latency| latency.count).sum(),
            lost: of.iter().map(|latency| latency.lost).sum(),
        }
    }
}

/// What was found.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) lines: Vec<Value>,
    pub(crate) missed: usize,
}

impl Report {
    pub(crate) fn bar(&mut self, scenario: &str, what: &str, without: f64, with: f64, bar: f64) {
        let ratio = with / without.max(f64::MIN_POSITIVE);
        let passed = ratio <= bar;
        self.missed += usize::from(!passed);
        let verdict = if passed { "PASS" } else { "FAIL" };
        println!("{scenario:9} {what:12} {without:10.2} {with:10.2} {ratio:7.2} {bar:5.2}  {verdict}");
        self.lines.push(json!({
            "scenario": scenario, "what": what, "without": without, "with": with, "ratio": ratio, "bar": bar, "passed": passed,
        }));
    }

    /// Something that must not be more than it may.
    pub(crate) fn at_most(&mut self, scenario: &str, what: &str, found: usize, most: usize) {
        let passed = found <= most;
        self.missed += usize::from(!passed);
        let verdict = if passed { "PASS" } else { "FAIL" };
        println!("{scenario:9} {what:12} {:10} {found:10} {:7} {most:5}  {verdict}", "", "");
        self.lines.push(json!({ "scenario": scenario, "what": what, "with": found, "bar": most, "passed": passed }));
    }

    pub(crate) fn note(&mut self, scenario: &str, what: &str, without: f64, with: f64) {
        println!("{scenario:9} {what:12} {without:10.2} {with:10.2} {:7.2}", with / without);
        self.lines.push(json!({ "scenario": scenario, "what": what, "without": without, "with": with }));
    }

    /// Something that there is only beside a disturbance.
    pub(crate) fn found(&mut self, scenario: &str, what: &str, found: f64) {
        println!("{scenario:9} {what:12} {:10} {found:10.2}", "");
        self.lines.push(json!({ "scenario": scenario, "what": what, "with": found }));
    }

    pub(crate) fn latencies(&mut self, scenario: &str, without: Latency, with: Latency, bar: f64) {
        self.note(scenario, "p50 ms", without.p50_ms, with.p50_ms);
        self.bar(scenario, "p99 ms", without.p99_ms, with.p99_ms, bar);
        self.at_most(scenario, "lost", without.lost + with.lost, 0);
        println!("{scenario:9} {:12} {:10} {:10}", "events", without.count, with.count);
    }
}
