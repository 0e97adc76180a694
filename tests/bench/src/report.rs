//! Rows: table, JSON, SVG.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// One figure of one system.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    group: String,
    workload: String,
    system: String,
    unit: String,
    median: f64,
    /// The median of the ratios to other systems in the same rounds, by their names.
    ratio_to: BTreeMap<String, f64>,
}

impl Row {
    pub(crate) fn single(group: &str, workload: &str, system: &str, unit: &str, value: f64) -> Self {
        Self {
            group: group.into(),
            workload: workload.into(),
            system: system.into(),
            unit: unit.into(),
            median: value,
            ratio_to: BTreeMap::new(),
        }
    }

    /// Beside another system.
    pub(crate) fn compare(&mut self, base: &str, ratio: f64) {
        self.ratio_to.insert(base.to_owned(), ratio);
    }
}

/// What a workload gave, round by round.
pub(crate) struct Samples {
    workload: String,
    unit: &'static str,
    systems: Vec<&'static str>,
    rounds: Vec<Vec<f64>>,
}

impl Samples {
    pub(crate) fn new(workload: String, unit: &'static str, systems: impl Iterator<Item = &'static str>) -> Self {
        Self { workload, unit, systems: systems.collect(), rounds: Vec::new() }
    }

    /// One figure for each system.
    pub(crate) fn add(&mut self, round: &[f64]) {
        self.rounds.push(round.to_vec());
    }

    fn column(&self, system: usize) -> Vec<f64> {
        self.rounds.iter().filter_map(|round| round.get(system).copied()).collect()
    }

    pub(crate) fn summary(&self) -> String {
        let mut text = self.workload.clone();
        for (index, system) in self.systems.iter().enumerate() {
            let _ = write!(text, ", {system} {:.0}", median(self.column(index)));
        }
        text
    }

    /// The rows, with ratios to the systems that are named.
    pub(crate) fn rows(&self, group: &str, bases: &[&str]) -> Vec<Row> {
        let row = |(index, system): (usize, &&'static str)| {
            let own = self.column(index);
            let mut row = Row::single(group, &self.workload, system, self.unit, median(own.clone()));
            for base in bases.iter().filter(|base| *base != system) {
                let Some(other) = self.systems.iter().position(|name| name == base) else { continue };
                let ratios = own.iter().zip(self.column(other)).map(|(own, other)| own / other).collect();
                row.ratio_to.insert((*base).to_owned(), median(ratios));
            }
            row
        };
        // What was not asked for was not measured.
        self.systems.iter().enumerate().filter(|_| !self.rounds.is_empty()).map(row).collect()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ratios(row: &Row) -> String {
    let all: Vec<String> = row.ratio_to.iter().map(|(system, ratio)| format!("{ratio:.2} of {system}")).collect();
    all.join(", ")
}

pub(crate) fn print(rows: &[Row]) {
    let mut before = "";
    for row in rows {
        let title = row.workload.as_str();
        if title != before {
            println!("\n{} · {title} ({})", row.group, row.unit);
            before = title;
        }
        println!("  {:<48} {:>10.1}   {}", row.system, row.median, ratios(row));
    }
}

pub(crate) fn json(rows: &[Row], path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(rows)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// One table for each group: a line for each workload, a column for each system.
pub(crate) fn markdown(rows: &[Row], path: &Path) -> Result<()> {
    let mut text = String::new();
    for group in rows.chunk_by(|row, next| row.group == next.group) {
        let mut systems: Vec<&str> = Vec::new();
        for row in group {
            if !systems.contains(&row.system.as_str()) {
                systems.push(&row.system);
            }
        }
        let name = group.first().map_or("", |row| row.group.as_str());
        writeln!(text, "**{name}**\n\n| workload | {} |", systems.join(" | "))?;
        writeln!(text, "|---|{}", "---|".repeat(systems.len()))?;
        for workload in group.chunk_by(|row, next| row.workload == next.workload) {
            let unit = workload.first().map_or("", |row| row.unit.as_str());
            let unit = if unit == "requests/s" { String::new() } else { format!(" ({unit})") };
            write!(text, "| {}{unit} |", workload.first().map_or("", |row| row.workload.as_str()))?;
            for system in &systems {
                let row = workload.iter().find(|row| row.system == *system);
                let cell = row.map_or(String::new(), |row| {
                    let ratios: Vec<String> = row
                        .ratio_to
                        .iter()
                        .filter(|_| system.starts_with("blockhouse"))
                        .map(|(base, ratio)| format!("{ratio:.2} × {base}"))
                        .collect();
                    let ratios = if ratios.is_empty() { String::new() } else { format!(" ({})", ratios.join(", ")) };
                    format!(" {}{ratios} ", thousands(row.median))
                });
                write!(text, "{cell}|")?;
            }
            writeln!(text)?;
        }
        writeln!(text)?;
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Four digits at most, or thousands.
fn thousands(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.0}k", value / 1000.0),
        value if value >= 100.0 => format!("{value:.0}"),
        value => format!("{value:.1}"),
    }
}

/// One bar for each ratio, with a line at 1.
pub(crate) fn svg(rows: &[Row], path: &Path) -> Result<()> {
    const SCALE: f64 = 160.0;
    const LEFT: f64 = 560.0;
    let bars: Vec<(String, f64)> = rows
        .iter()
        .flat_map(|row| {
            let name = format!("{} {}: {}", row.group, row.workload, row.system);
            row.ratio_to.iter().map(move |(base, ratio)| (format!("{name} / {base}"), *ratio))
        })
        .collect();
    let height = bars.len() * 18 + 30;
    let mut text = String::new();
    writeln!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1200\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
    )?;
    for (index, (name, ratio)) in bars.iter().enumerate() {
        let y = index * 18 + 10;
        let width = (ratio.min(3.5) * SCALE).max(1.0);
        let colour = if *ratio >= 0.95 { "#2a7f62" } else { "#b5651d" };
        let name = name.replace('&', "&amp;").replace('<', "&lt;");
        writeln!(text, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>", LEFT - 8.0, y + 12)?;
        writeln!(text, "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"14\" fill=\"{colour}\"/>")?;
        writeln!(text, "<text x=\"{:.1}\" y=\"{}\">{ratio:.2}</text>", LEFT + width + 5.0, y + 12)?;
    }
    writeln!(
        text,
        "<line x1=\"{0}\" x2=\"{0}\" y1=\"0\" y2=\"{height}\" stroke=\"black\" stroke-dasharray=\"3\"/>\n</svg>",
        LEFT + SCALE
    )?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
