//! Bars against targets: who reaches it, and by how much.

use super::axis::{Axis, Scale, short};
use super::svg::{Anchor, Svg};
use crate::figure::{Bound, Bounded, Figure};

const WIDTH: f64 = 1120.0;
const LEFT: f64 = 390.0;
const RIGHT: f64 = 210.0;
const TOP: f64 = 70.0;
const ROW: f64 = 22.0;

/// A bar for each figure that has a target. The line in the middle is the target: right of it is better, each step a factor.
pub(crate) fn bars_against_targets(figures: &[Figure]) -> String {
    let rows: Vec<(&Figure, f64)> =
        figures.iter().filter_map(|figure| figure.reached().map(|reached| (figure, reached))).collect();
    let height = TOP + ROW * rows.len() as f64 + 50.0;
    let values = rows.iter().map(|row| row.1).chain([0.5, 2.0]);
    let axis = Axis::over(values, Scale::Logarithmic, LEFT, WIDTH - RIGHT);
    let mut svg = Svg::new(WIDTH, height);
    svg.text((16.0, 26.0), 16, Anchor::Start, "Measured against targets");
    let told = "how many times the target is reached (right of the line: met), by factors";
    svg.text((LEFT, 50.0), 12, Anchor::Start, told);
    let foot = TOP + ROW * rows.len() as f64;
    for mark in axis.marks() {
        svg.line((axis.at(mark), TOP - 6.0), (axis.at(mark), foot), "#e4e4e4", 1.0);
        svg.text((axis.at(mark), foot + 18.0), 12, Anchor::Middle, &format!("{}x", short(mark)));
    }
    for (index, (figure, reached)) in rows.iter().enumerate() {
        let top = TOP + ROW * index as f64;
        let (from, to) = (axis.at(1.0), axis.at(*reached));
        let colour = if figure.met == Some(true) { "#2ca02c" } else { "#d62728" };
        svg.rectangle((from.min(to), top + 4.0), (to - from).abs().max(1.0), ROW - 8.0, colour);
        svg.text((LEFT - 8.0, top + 15.0), 12, Anchor::End, &figure.name);
        svg.text((WIDTH - RIGHT + 8.0, top + 15.0), 12, Anchor::Start, &verdict(figure));
    }
    svg.line((axis.at(1.0), TOP - 6.0), (axis.at(1.0), foot), "#222", 2.0);
    svg.text((axis.at(1.0), foot + 36.0), 12, Anchor::Middle, "target");
    svg.finish()
}

fn verdict(figure: &Figure) -> String {
    let (number, unit) = match figure.target_of {
        Some(Bounded::Ratio) => (figure.ratio.unwrap_or(f64::NAN), ""),
        _ => (figure.value, figure.unit),
    };
    let told = |number: f64| if number.abs() < 10.0 { format!("{number:.2}") } else { short(number) };
    let target = told(figure.target.unwrap_or(f64::NAN));
    let target = match figure.bound {
        Some(Bound::AtLeast) => format!(">= {target}"),
        Some(Bound::Between) => format!("{target}..{}", told(figure.target_max.unwrap_or(f64::NAN))),
        _ => format!("<= {target}"),
    };
    format!("{} {unit} (target {target})", told(number))
}

#[cfg(test)]
mod tests {
    use super::bars_against_targets;
    use crate::figure::{Figure, RatioOf, Target};
    use crate::samples::Samples;

    #[test]
    fn met_and_missed_targets_are_told_apart() {
        let figure = |name: &str, value: f64| {
            Figure::alone(name, "operations/s", &Samples::exactly(value))
                .beside("echo", &Samples::exactly(10.0), RatioOf::ValueToReference)
                .judged(Target::ratio_at_least(0.7))
        };
        let plain = Figure::alone("plain", "bytes", &Samples::exactly(1.0));
        let svg = bars_against_targets(&[figure("good", 9.0), figure("bad", 5.0), plain]);
        assert!(svg.contains("#2ca02c") && svg.contains("#d62728"));
        assert!(svg.contains("0.50") && svg.contains("target &gt;= 0.70"), "{svg}");
        assert!(!svg.contains("plain"), "a figure without a target has no bar");
    }
}
