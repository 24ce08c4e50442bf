//! How results are shown: tables, one JSON object, and plots.

use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use plotters::prelude::*;

/// What goes to standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// For people.
    Table,
    /// One JSON object.
    Json,
}

/// Time between two lines of progress of the same stage.
const PROGRESS_PAUSE: Duration = Duration::from_secs(1);

/// Progress on standard error: a line for every stage, and one a second within a stage.
pub fn show_progress(stage: &str, done: usize, total: usize) {
    static SHOWN: Mutex<Option<(String, Instant)>> = Mutex::new(None);
    let mut shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if shown.as_ref().is_some_and(|(last, at)| last == stage && at.elapsed() < PROGRESS_PAUSE) {
        return;
    }
    if total > 1 {
        eprintln!("{stage}: {done} of {total}");
    } else {
        eprintln!("{stage}");
    }
    *shown = Some((stage.to_owned(), Instant::now()));
}

/// Rows of cells under a header, written as a Markdown table with aligned columns.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this header.
    #[must_use]
    pub fn new<const N: usize>(header: [&str; N]) -> Self {
        Self { rows: vec![header.map(str::to_owned).to_vec()] }
    }

    /// Adds a row of as many cells as the header has.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (index, row) in self.rows.iter().enumerate() {
            for (cell, width) in row.iter().zip(&widths) {
                write!(f, "| {cell:width$} ")?;
            }
            writeln!(f, "|")?;
            if index == 0 {
                for width in &widths {
                    write!(f, "|{:-<1$}", "", width + 2)?;
                }
                writeln!(f, "|")?;
            }
        }
        Ok(())
    }
}

/// A line of a plot.
#[derive(Clone, Debug)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Points in ascending x.
    pub points: Vec<(f64, f64)>,
}

/// A plot of lines over one x axis; the y axis is logarithmic.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Caption.
    pub title: String,
    /// Name of the x axis with its unit.
    pub x_label: String,
    /// Name of the y axis with its unit.
    pub y_label: String,
    /// Lines.
    pub series: Vec<Series>,
}

impl Plot {
    /// Writes the plot as an SVG file.
    ///
    /// # Errors
    /// No point above zero to show, or the file cannot be written.
    pub fn write_svg(&self, path: &Path) -> Result<()> {
        self.draw(path).with_context(|| format!("plot {}", path.display()))
    }

    fn draw(&self, path: &Path) -> Result<()> {
        let points = || self.series.iter().flat_map(|series| &series.points).filter(|point| point.1 > 0.0);
        let ends = |of: fn(&(f64, f64)) -> f64| {
            let values = || points().map(of);
            (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
        };
        ensure!(points().next().is_some(), "no point above zero to show");
        let ((left, right), (bottom, top)) = (ends(|point| point.0), ends(|point| point.1));
        let area = SVGBackend::new(path, (900, 520)).into_drawing_area();
        let failed = |error: &dyn fmt::Display| anyhow!("{error}");
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(14)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d(left..right.max(left + 1.0), (bottom * 0.8..top * 1.6).log_scale())
            .map_err(|error| failed(&error))?;
        let mesh = chart.configure_mesh().x_desc(&self.x_label).y_desc(&self.y_label).light_line_style(WHITE).draw();
        mesh.map_err(|error| failed(&error))?;
        for (index, series) in self.series.iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            let visible = series.points.iter().copied().filter(|point| point.1 > 0.0);
            let drawn = chart.draw_series(LineSeries::new(visible, color.stroke_width(2))).map_err(|error| failed(&error))?;
            drawn.label(&series.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        let legend = chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).background_style(WHITE.mix(0.85)).draw();
        legend.map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_its_columns_up() {
        let mut table = Table::new(["what", "ms"]);
        table.row(["dense".to_owned(), "144.0".to_owned()]);
        assert_eq!(table.to_string(), "| what  | ms    |\n|-------|-------|\n| dense | 144.0 |\n");
    }

    #[test]
    fn a_plot_names_its_axes_and_draws_every_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("plot.svg");
        let line =
            |name: &str, y: f64| Series { name: name.to_owned(), points: (0..5).map(|x| (f64::from(x), y + f64::from(x))).collect() };
        let mut plot = Plot {
            title: "Steps".to_owned(),
            x_label: "step".to_owned(),
            y_label: "time, ms".to_owned(),
            series: vec![line("dense", 100.0), line("sparse", 10.0)],
        };
        plot.write_svg(&path).expect("a plot");
        let text = std::fs::read_to_string(&path).expect("the file");
        for part in ["<svg", "Steps", "time, ms", "dense", "sparse"] {
            assert!(text.contains(part), "{part} is missing");
        }
        assert!(text.matches("<polyline").count() >= 4, "two lines and two legend entries");
        plot.series.clear();
        let error = plot.write_svg(&path).expect_err("nothing to show");
        assert!(format!("{error:#}").contains("no point above zero"), "{error:#}");
        plot.series.push(line("dense", 1.0));
        assert!(plot.write_svg(&folder.path().join("missing/plot.svg")).is_err());
    }
}
