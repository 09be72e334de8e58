//! What the rounds of one measurement gave.

/// One value a round, at least one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Samples {
    sorted: Vec<f64>,
}

impl Samples {
    /// The values of the rounds, in any order.
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "a measurement has at least one round");
        assert!(values.iter().all(|value| value.is_finite()), "a measured value is a number");
        values.sort_by(f64::total_cmp);
        Self { sorted: values }
    }

    /// A value that is what it is, without rounds: a count or a budget.
    pub(crate) fn exactly(value: f64) -> Self {
        Self::new(vec![value])
    }

    /// The value in the middle; of two, their mean.
    pub(crate) fn median(&self) -> f64 {
        let upper = self.sorted[self.sorted.len() / 2];
        let lower = self.sorted[(self.sorted.len() - 1) / 2];
        f64::midpoint(lower, upper)
    }

    /// The smallest value.
    pub(crate) fn min(&self) -> f64 {
        self.sorted[0]
    }

    /// The largest value.
    pub(crate) fn max(&self) -> f64 {
        self.sorted[self.sorted.len() - 1]
    }

    /// How many rounds there were.
    pub(crate) fn rounds(&self) -> usize {
        self.sorted.len()
    }

    /// Every value through `convert`, for another unit.
    pub(crate) fn map(&self, convert: impl Fn(f64) -> f64) -> Self {
        Self::new(self.sorted.iter().map(|&value| convert(value)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::Samples;

    #[test]
    fn the_median_stands_between_the_halves() {
        for (values, median) in [
            (vec![3.0], 3.0),
            (vec![9.0, 1.0], 5.0),
            (vec![5.0, 1.0, 2.0], 2.0),
            (vec![4.0, 1.0, 3.0, 2.0], 2.5),
        ] {
            let samples = Samples::new(values.clone());
            assert_eq!(samples.median(), median, "{values:?}");
            assert!(samples.min() <= median && median <= samples.max(), "{values:?}");
        }
    }
}
