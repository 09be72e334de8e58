//! Lines over an axis.

use super::axis::{Axis, Scale, short};
use super::svg::{Anchor, Svg};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 46.0;
const BOTTOM: f64 = 56.0;
const COLOURS: [&str; 12] = [
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#393b79", "#637939",
];

/// Points of a line, as x and y.
pub(crate) type Points = Vec<(f64, f64)>;

/// One line of a chart.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// What it is.
    pub(crate) name: String,
    /// Its points, in the order of x.
    pub(crate) points: Points,
    /// Whether it is a reference, drawn dashed.
    pub(crate) reference: bool,
}

/// A chart of lines.
#[derive(Clone, Debug)]
pub(crate) struct Chart {
    /// Name of its file, without the ending.
    pub(crate) file: String,
    /// What it shows.
    pub(crate) title: String,
    /// What x is, with its unit.
    pub(crate) x: &'static str,
    /// What y is, with its unit.
    pub(crate) y: &'static str,
    /// How y counts; x always counts by factors.
    pub(crate) y_scale: Scale,
    /// The lines.
    pub(crate) lines: Vec<Line>,
}

impl Chart {
    /// The drawing.
    pub(crate) fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| line.points.iter());
        let x = Axis::over(points().map(|p| p.0), Scale::Logarithmic, LEFT, WIDTH - RIGHT);
        let y = Axis::over(points().map(|p| p.1), self.y_scale, HEIGHT - BOTTOM, TOP);
        let mut svg = Svg::new(WIDTH, HEIGHT);
        svg.text((LEFT, 26.0), 16, Anchor::Start, &self.title);
        for mark in y.marks() {
            svg.line((LEFT, y.at(mark)), (WIDTH - RIGHT, y.at(mark)), "#e4e4e4", 1.0);
            svg.text((LEFT - 8.0, y.at(mark) + 4.0), 12, Anchor::End, &short(mark));
        }
        self.mark_x(&mut svg, x);
        svg.line((LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM), "#222", 1.0);
        svg.line((LEFT, TOP), (LEFT, HEIGHT - BOTTOM), "#222", 1.0);
        svg.text((f64::midpoint(LEFT, WIDTH - RIGHT), HEIGHT - 14.0), 13, Anchor::Middle, self.x);
        svg.upright((20.0, f64::midpoint(TOP, HEIGHT - BOTTOM)), 13, self.y);
        // A line and its reference stand one after the other and share a colour.
        let mut colour = COLOURS.len() - 1;
        for (index, line) in self.lines.iter().enumerate() {
            if !line.reference || index == 0 {
                colour = (colour + 1) % COLOURS.len();
            }
            let drawn: Vec<_> = line.points.iter().map(|p| (x.at(p.0), y.at(p.1))).collect();
            svg.dashes(&drawn, COLOURS[colour], line.reference);
            drawn.iter().for_each(|&point| svg.dot(point, COLOURS[colour]));
            let height = TOP + 12.0 + 22.0 * index as f64;
            let left = WIDTH - RIGHT + 14.0;
            svg.dashes(&[(left, height - 4.0), (left + 26.0, height - 4.0)], COLOURS[colour], line.reference);
            svg.text((left + 32.0, height), 12, Anchor::Start, &line.name);
        }
        svg.finish()
    }

    /// Marks the x of every point; those too close to the one before stay unnamed.
    fn mark_x(&self, svg: &mut Svg, x: Axis) {
        let mut all: Vec<f64> = self.lines.iter().flat_map(|line| line.points.iter().map(|p| p.0)).collect();
        all.sort_by(f64::total_cmp);
        all.dedup();
        let mut free_from = 0.0;
        for value in all {
            let at = x.at(value);
            svg.line((at, TOP), (at, HEIGHT - BOTTOM), "#f0f0f0", 1.0);
            if at >= free_from {
                svg.text((at, HEIGHT - BOTTOM + 18.0), 12, Anchor::Middle, &short(value));
                free_from = at + 44.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Chart, Line, Scale};

    #[test]
    fn a_chart_shows_its_labels_and_one_dot_a_point() {
        let line = |name: &str, reference| Line {
            name: name.into(),
            points: vec![(64.0, 1.0), (4096.0, 2.0), (1_048_576.0, 3.0)],
            reference,
        };
        let chart = Chart {
            file: "x".into(),
            title: "DMA over TCP".into(),
            x: "size (bytes)",
            y: "throughput (MB/s)",
            y_scale: Scale::Linear,
            lines: vec![line("server", false), line("echo", true)],
        };
        let svg = chart.svg();
        for label in ["DMA over TCP", "size (bytes)", "throughput (MB/s)", ">server<", ">echo<"] {
            assert!(svg.contains(label), "{label}");
        }
        assert_eq!(svg.matches("<circle").count(), 6);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "every coordinate is a number");
    }
}
