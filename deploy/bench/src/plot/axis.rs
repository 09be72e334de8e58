//! An axis: where a value stands, and which values are marked.

/// How an axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// By factors.
    Logarithmic,
}

/// A range of values over a range of pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// An axis that holds all `values`, drawn between two pixels.
    pub(super) fn over(values: impl Iterator<Item = f64>, scale: Scale, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| value.is_finite()) {
            (low, high) = (low.min(value), high.max(value));
        }
        let (low, high) = match scale {
            Scale::Linear => (0.0, if high > 0.0 { high * 1.1 } else { 1.0 }),
            Scale::Logarithmic if low > 0.0 && low < high => (low / 1.15, high * 1.15),
            Scale::Logarithmic if low > 0.0 && low.is_finite() => (low / 2.0, low * 2.0),
            Scale::Logarithmic => (1.0, 10.0),
        };
        Self { scale, low, high, from, to }
    }

    /// The pixel of a value.
    pub(super) fn at(&self, value: f64) -> f64 {
        let part = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Logarithmic => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + part * (self.to - self.from)
    }

    /// Values to mark: round ones, about five.
    pub(super) fn marks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let rough = (self.high - self.low) / 5.0;
                let power = 10f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&step| step >= rough);
                let step = step.unwrap_or(rough);
                (0..=10u8).map(|n| f64::from(n) * step).take_while(|&value| value <= self.high).collect()
            }
            Scale::Logarithmic => {
                let steps: &[f64] = if self.high / self.low > 300.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                (-12..=15)
                    .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)))
                    .filter(|value| (self.low..=self.high).contains(value))
                    .collect()
            }
        }
    }
}

/// A number as people write it: `1.5 k`, `20 M`.
pub(super) fn short(value: f64) -> String {
    let (scaled, suffix) = match value.abs() {
        v if v >= 1e9 => (value / 1e9, " G"),
        v if v >= 1e6 => (value / 1e6, " M"),
        v if v >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = if scaled.abs() >= 100.0 || scaled.fract() == 0.0 {
        0
    } else if scaled.abs() >= 1.0 {
        1
    } else {
        2
    };
    format!("{scaled:.digits$}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::{Axis, Scale, short};

    #[test]
    fn an_axis_holds_its_values_and_marks_round_ones() {
        for scale in [Scale::Linear, Scale::Logarithmic] {
            let axis = Axis::over([64.0, 1500.0, 1_048_576.0].into_iter(), scale, 10.0, 500.0);
            for value in [64.0, 1500.0, 1_048_576.0] {
                assert!((10.0..=500.0).contains(&axis.at(value)), "{scale:?} {value}");
            }
            assert!(axis.at(64.0) < axis.at(1500.0), "{scale:?}");
            assert!((3..=12).contains(&axis.marks().len()), "{scale:?} {:?}", axis.marks());
        }
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in
            [(0.5, "0.50"), (7.0, "7"), (64.0, "64"), (1500.0, "1500"), (20_000_000.0, "20 M")]
        {
            assert_eq!(short(value), text);
        }
    }
}
