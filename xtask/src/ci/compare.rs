//! `ci --compare A.json B.json…`: whether two runs proved the same things of the same inputs.

use std::collections::BTreeSet;

use super::receipt::{Receipt, StepReceipt};

/// The receipts of a run's jobs as one.
pub fn merged(mut receipts: Vec<Receipt>) -> Option<Receipt> {
    let mut whole = receipts.pop()?;
    for receipt in receipts {
        whole.interrupted |= receipt.interrupted;
        whole.steps.extend(receipt.steps);
        whole.files.extend(receipt.files);
    }
    Some(whole)
}

/// All that differs, a line each; nothing where both proved the same.
pub fn differences(a: &Receipt, b: &Receipt) -> Vec<String> {
    let names: BTreeSet<&String> = a.steps.iter().chain(&b.steps).map(|s| &s.name).collect();
    let mut lines = Vec::new();
    for name in names {
        let find = |receipt: &'_ Receipt| receipt.steps.iter().position(|s| s.name == *name);
        match (find(a), find(b)) {
            (Some(x), Some(y)) => step(a, &a.steps[x], b, &b.steps[y], &mut lines),
            (Some(_), None) => lines.push(format!("{name}: only the first run has it")),
            (None, _) => lines.push(format!("{name}: only the second run has it")),
        }
    }
    lines
}

fn step(a: &Receipt, x: &StepReceipt, b: &Receipt, y: &StepReceipt, lines: &mut Vec<String>) {
    let name = &x.name;
    if !x.outcome.is_pass() && !y.outcome.is_pass() {
        lines.push(format!(
            "{name}: {} in both runs: neither proves anything",
            x.outcome
        ));
        return;
    }
    if x.outcome.is_pass() != y.outcome.is_pass() {
        let how = |step: &StepReceipt| match step.reason.as_str() {
            "" => step.outcome.to_string(),
            reason => format!("{} ({reason})", step.outcome),
        };
        lines.push(format!(
            "{name}: {} in the first run, {} in the second",
            how(x),
            how(y)
        ));
    }
    match (&x.inputs, &y.inputs) {
        (Some(before), Some(now)) => {
            let differences = now.fingerprint(b).differences(&before.fingerprint(a));
            lines.extend(differences.iter().map(|line| format!("{name}: {line}")));
        }
        (None, None) if x.command == y.command => {}
        _ => lines.push(format!("{name}: {} (was {})", y.command, x.command)),
    }
}
