//! What benchmarks say of what they measured.

/// Prints a line with whether it is as is wanted.
#[must_use]
pub fn judged(what: &str, is_met: bool) -> bool {
    println!("{what}: {}", if is_met { "met" } else { "NOT MET" });
    is_met
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
