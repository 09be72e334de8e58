//! A figure: a value beside its reference, and whether its target is met.
//!
//! **Promise:** a figure with a target always has a verdict, and the verdict follows from the numbers that are printed beside it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::samples::Samples;

/// Which way the target bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    /// The more the better.
    AtLeast,
    /// The less the better.
    AtMost,
    /// Within a range.
    Between,
}

/// What the target bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bounded {
    /// The ratio of value and reference.
    Ratio,
    /// The value itself.
    Value,
}

/// How the ratio is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum RatioOf {
    /// A share of the reference, or how many times it costs.
    #[serde(rename = "value/reference")]
    ValueToReference,
    /// How many times faster than the reference.
    #[serde(rename = "reference/value")]
    ReferenceToValue,
}

/// A target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Target {
    bound: Bound,
    bounded: Bounded,
    number: f64,
    /// The upper end of a range.
    number_max: Option<f64>,
}

impl Target {
    const fn new(bound: Bound, bounded: Bounded, number: f64, number_max: Option<f64>) -> Self {
        Self { bound, bounded, number, number_max }
    }
    /// The ratio must be at least this.
    pub(crate) const fn ratio_at_least(number: f64) -> Self {
        Self::new(Bound::AtLeast, Bounded::Ratio, number, None)
    }
    /// The ratio must be at most this.
    pub(crate) const fn ratio_at_most(number: f64) -> Self {
        Self::new(Bound::AtMost, Bounded::Ratio, number, None)
    }
    /// The value must be at least this.
    pub(crate) const fn value_at_least(number: f64) -> Self {
        Self::new(Bound::AtLeast, Bounded::Value, number, None)
    }
    /// The value must be at most this.
    pub(crate) const fn value_at_most(number: f64) -> Self {
        Self::new(Bound::AtMost, Bounded::Value, number, None)
    }
    /// The ratio must lie between these.
    pub(crate) const fn ratio_between(low: f64, high: f64) -> Self {
        Self::new(Bound::Between, Bounded::Ratio, low, Some(high))
    }
    /// The value must lie between these.
    pub(crate) const fn value_between(low: f64, high: f64) -> Self {
        Self::new(Bound::Between, Bounded::Value, low, Some(high))
    }
}

/// Smallest and largest value of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl From<&Samples> for Spread {
    fn from(samples: &Samples) -> Self {
        Self { min: samples.min(), max: samples.max() }
    }
}

/// One line of the report. The fields are those of `report.json`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    /// Stable name, for programs.
    pub(crate) name: String,
    /// Median of the rounds.
    pub(crate) value: f64,
    /// Unit of value and reference.
    pub(crate) unit: &'static str,
    /// Median of the reference's rounds.
    pub(crate) reference: Option<f64>,
    /// The ratio, as `ratio_of` says.
    pub(crate) ratio: Option<f64>,
    /// The target's number; `bound` and `target_of` say how to read it.
    pub(crate) target: Option<f64>,
    /// The upper end, when the target is a range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target_max: Option<f64>,
    /// The verdict; absent without a target.
    pub(crate) met: Option<bool>,
    /// Which way the target bounds.
    pub(crate) bound: Option<Bound>,
    /// What the target bounds.
    pub(crate) target_of: Option<Bounded>,
    /// How the ratio is made.
    pub(crate) ratio_of: Option<RatioOf>,
    /// What the reference is, in words.
    pub(crate) reference_is: Option<&'static str>,
    /// Spread of the value over the rounds.
    pub(crate) spread: Spread,
    /// Spread of the reference over the rounds.
    pub(crate) reference_spread: Option<Spread>,
    /// How many rounds there were.
    pub(crate) rounds: usize,
    /// What was counted beside the value, per packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) counts: Option<BTreeMap<&'static str, f64>>,
    /// Whether it stands in a table of its own, and not among the others.
    #[serde(skip)]
    pub(crate) tabulated: bool,
}

impl Figure {
    /// A value on its own.
    pub(crate) fn alone(name: impl Into<String>, unit: &'static str, samples: &Samples) -> Self {
        Self {
            name: name.into(),
            value: samples.median(),
            unit,
            reference: None,
            ratio: None,
            target: None,
            target_max: None,
            met: None,
            bound: None,
            target_of: None,
            ratio_of: None,
            reference_is: None,
            spread: samples.into(),
            reference_spread: None,
            rounds: samples.rounds(),
            counts: None,
            tabulated: false,
        }
    }

    /// Puts the reference beside it; medians are compared.
    pub(crate) fn beside(
        mut self,
        reference_is: &'static str,
        reference: &Samples,
        ratio_of: RatioOf,
    ) -> Self {
        let median = reference.median();
        let (above, below) = match ratio_of {
            RatioOf::ValueToReference => (self.value, median),
            RatioOf::ReferenceToValue => (median, self.value),
        };
        self.reference = Some(median);
        self.reference_spread = Some(reference.into());
        self.reference_is = Some(reference_is);
        self.ratio_of = Some(ratio_of);
        // A reference of zero (a memory difference below the page size) gives no ratio.
        self.ratio = (below != 0.0).then(|| above / below);
        self
    }

    /// Judges it. A target for a ratio that could not be made is missed.
    pub(crate) fn judged(mut self, target: Target) -> Self {
        let number = match target.bounded {
            Bounded::Ratio => self.ratio,
            Bounded::Value => Some(self.value),
        };
        let met = number.is_some_and(|number| match target.bound {
            Bound::AtLeast => number >= target.number,
            Bound::AtMost => number <= target.number,
            Bound::Between => number >= target.number && target.number_max.is_some_and(|high| number <= high),
        });
        self.target = Some(target.number);
        self.target_max = target.number_max;
        self.bound = Some(target.bound);
        self.target_of = Some(target.bounded);
        self.met = Some(met);
        self
    }

    /// How far the target is reached: 1 is just reached, more is better; whichever way it bounds.
    pub(crate) fn reached(&self) -> Option<f64> {
        let number = match self.target_of? {
            Bounded::Ratio => self.ratio?,
            Bounded::Value => self.value,
        };
        let target = self.target?;
        let reached = match self.bound? {
            Bound::AtLeast => number / target,
            Bound::AtMost => target / number,
            Bound::Between => (number / target).min(self.target_max? / number),
        };
        reached.is_finite().then_some(reached)
    }
}

#[cfg(test)]
mod tests {
    use super::{Figure, RatioOf, Target};
    use crate::samples::Samples;

    fn check(value: f64, reference: f64, ratio_of: RatioOf, target: Target, met: bool, reached: f64) {
        let figure = Figure::alone("x", "ns", &Samples::exactly(value))
            .beside("y", &Samples::exactly(reference), ratio_of)
            .judged(target);
        assert_eq!(figure.met, Some(met), "{figure:?}");
        assert!((figure.reached().expect("there is a target") - reached).abs() < 1e-9, "{figure:?}");
    }

    #[test]
    fn a_verdict_follows_from_the_numbers_beside_it() {
        use RatioOf::{ReferenceToValue, ValueToReference};
        check(10.0, 50.0, ReferenceToValue, Target::ratio_at_least(5.0), true, 1.0);
        check(10.0, 49.0, ReferenceToValue, Target::ratio_at_least(5.0), false, 0.98);
        check(60.0, 10.0, ValueToReference, Target::ratio_at_most(6.0), true, 1.0);
        check(80.0, 10.0, ValueToReference, Target::ratio_at_most(6.0), false, 0.75);
        check(400.0, 1.0, ValueToReference, Target::value_at_most(500.0), true, 1.25);
        check(0.5, 1.0, ValueToReference, Target::value_at_least(1.0), false, 0.5);
        check(98.0, 100.0, ValueToReference, Target::ratio_between(0.98, 1.02), true, 1.0);
        check(103.0, 100.0, ValueToReference, Target::ratio_between(0.98, 1.02), false, 1.02 / 1.03);
        check(300.0, 1.0, ValueToReference, Target::value_between(360.0, 420.0), false, 300.0 / 360.0);
    }

    #[test]
    fn a_ratio_that_cannot_be_made_misses_its_target() {
        let figure = Figure::alone("x", "ns", &Samples::exactly(1.0))
            .beside("y", &Samples::exactly(0.0), RatioOf::ValueToReference)
            .judged(Target::ratio_at_most(6.0));
        assert_eq!((figure.ratio, figure.met), (None, Some(false)));
    }
}
