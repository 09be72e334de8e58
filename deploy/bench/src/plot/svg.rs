//! Just enough SVG.

use std::fmt::Write;

/// Where a text stands relative to its point.
#[derive(Clone, Copy, Debug)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing on white.
#[derive(Debug)]
pub(super) struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    pub(super) fn new(width: f64, height: f64) -> Self {
        Self { width, height, body: String::new() }
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        self.body.write_fmt(element).expect("a string takes everything");
        self.body.push('\n');
    }

    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}" stroke-width="{width}"/>"#
        ));
    }

    pub(super) fn dashes(&mut self, points: &[(f64, f64)], colour: &str, dashed: bool) {
        let mut path = String::new();
        for (x, y) in points {
            write!(path, "{x:.1},{y:.1} ").expect("a string takes everything");
        }
        let dash = if dashed { r#" stroke-dasharray="6 4""# } else { "" };
        let path = path.trim_end();
        self.add(format_args!(
            r#"<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>"#
        ));
    }

    pub(super) fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        self.add(format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{colour}"/>"#));
    }

    pub(super) fn rectangle(&mut self, (x, y): (f64, f64), width: f64, height: f64, colour: &str) {
        self.add(format_args!(
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#
        ));
    }

    pub(super) fn text(&mut self, (x, y): (f64, f64), size: u32, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escaped(text);
        self.add(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" text-anchor="{anchor}">{text}</text>"#
        ));
    }

    /// A text that reads upwards, centred at its point.
    pub(super) fn upright(&mut self, (x, y): (f64, f64), size: u32, text: &str) {
        let text = escaped(text);
        self.add(format_args!(
            r#"<text transform="translate({x:.1} {y:.1}) rotate(-90)" font-size="{size}" text-anchor="middle">{text}</text>"#
        ));
    }

    pub(super) fn finish(self) -> String {
        let Self { width, height, body } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"sans-serif\" fill=\"#222\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n{body}</svg>\n"
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::{Anchor, Svg};

    #[test]
    fn text_cannot_break_the_markup() {
        let mut svg = Svg::new(10.0, 10.0);
        svg.text((1.0, 1.0), 12, Anchor::Start, "a < b & c >= d");
        assert!(svg.finish().contains("a &lt; b &amp; c &gt;= d</text>"));
    }
}
