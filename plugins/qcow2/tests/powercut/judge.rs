//! What may be in a state, and what is.

use std::path::Path;
use std::process::Command;

use blockhouse_plugin::testing::Storage;
use blockhouse_plugin::{Access, Checker, Repair, Snapshots, Writer};
use blockhouse_qcow2::Qcow2;

use crate::images::{Made, TEMPLATES, Template, is_dirty, sectors};
use crate::random::Random;
use crate::run::{Run, below, open, read_all, storage};
use crate::states::{Files, States, files};
use crate::{BASE, DATA, IMAGE, QEMU_EVERY, SECTOR};

/// Of the states of a seed, one in so many is written again, and the power fails in that as well.
const RECOVER_EVERY: usize = 6;
/// Cuts in each recovery.
const RECOVERY_CUTS: usize = 8;
/// Of the states, one in so many has its snapshots read.
const SNAPSHOTS_EVERY: usize = 3;

/// What was found in how many states.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) states: u64,
    pub(crate) leaks: u64,
    /// States that QEMU checked.
    pub(crate) in_qemu: u64,
    pub(crate) changes: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.states += other.states;
        self.leaks += other.leaks;
        self.in_qemu += other.in_qemu;
        self.changes += other.changes;
    }
}

/// Checks states of one template.
struct Bench<'a> {
    template: &'a Template,
    made: &'a Made,
    directory: &'a Path,
    tally: Tally,
    /// Which states QEMU checks: a thing of its own, so that it has no influence on what is done.
    choice: Random,
}

impl Bench<'_> {
    /// Nothing in the image is corrupt. One that is marked dirty is as it would be after the repair when it is
    /// opened to be written.
    fn check(&mut self, image: &[u8]) -> Result<(), String> {
        let checked = Storage::new();
        checked.insert(IMAGE, image);
        let dirty = is_dirty(image);
        if dirty {
            let report = Qcow2::check(checked.file(IMAGE, Access::ReadWrite), Some(Repair::All));
            report.map_err(|error| format!("the repair: {error}"))?;
        }
        let found =
            Qcow2::check(checked.file(IMAGE, Access::ReadOnly), None).map_err(|error| format!("the check: {error}"))?;
        if found.corruptions > 0 {
            return Err(format!("{} corruptions: {:?}", found.corruptions, found.findings));
        }
        self.tally.states += 1;
        self.tally.leaks += found.leaks;
        if self.choice.below(QEMU_EVERY) > 0 {
            return Ok(());
        }
        self.tally.in_qemu += 1;
        std::fs::write(self.directory.join("top.qcow2"), image).unwrap();
        if dirty {
            qemu_img_check(self.directory, &["-r", "all"])?;
        }
        let (corruptions, leaks) = qemu_img_check(self.directory, &[])?;
        if (corruptions, leaks) != (0, found.leaks) {
            let ours = found.leaks;
            return Err(format!("qemu-img check finds {corruptions} corruptions and {leaks} leaks, we {ours} leaks"));
        }
        Ok(())
    }

    fn read(&self, storage: &Storage) -> Result<Vec<u64>, String> {
        read_all(&mut open(storage, Access::ReadOnly), self.template.size, self.made, self.template)
    }
}

/// What `qemu-img check` says of `top.qcow2`: corruptions and leaks.
fn qemu_img_check(directory: &Path, options: &[&str]) -> Result<(u64, u64), String> {
    let mut command = Command::new("qemu-img");
    command.arg("check").args(options);
    if options.is_empty() {
        command.arg("-U");
    }
    let output = command.args(["-f", "qcow2", "--output=json", "top.qcow2"]).current_dir(directory).output().unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("qemu-img check: {}", String::from_utf8_lossy(&output.stderr)))?;
    let number = |name: &str| found[name].as_u64().unwrap_or(0);
    Ok((number("corruptions") + number("check-errors"), number("leaks")))
}

/// Runs one seed and returns what was looked at, or what was violated.
pub(crate) fn run_seed(seed: u64, cuts: usize, made: &[Made], directory: &Path) -> Result<Tally, String> {
    let mut random = Random(seed);
    let which = random.below(TEMPLATES.len() as u64) as usize;
    let (template, made) = (&TEMPLATES[which], &made[which]);
    std::fs::write(directory.join("base.raw"), &made.base).unwrap();
    std::fs::write(directory.join("d.bin"), &made.data).unwrap();
    let mut bench = Bench { template, made, directory, tally: Tally::default(), choice: Random(!seed) };
    let mut run = Run::new(template, made, random);
    let mut random = Random(run.random.next());
    bench.tally.changes += run.changes.len() as u64;
    let mut states = States::new(files(made), &run.changes);
    for (number, cut) in States::cuts(&run.changes, cuts, &mut random).into_iter().enumerate() {
        let state = states.at(cut, &mut random);
        judge(&mut bench, &run, number, cut, state, &mut random).map_err(|why| {
            format!("{why}\ntemplate {}, cut at {cut} of {}\n{}", template.name, run.changes.len(), run.log)
        })?;
    }
    Ok(bench.tally)
}

fn judge(
    bench: &mut Bench<'_>,
    run: &Run<'_>,
    number: usize,
    cut: usize,
    state: Files,
    random: &mut Random,
) -> Result<(), String> {
    bench.check(&state[0])?;
    let after = storage(state, &bench.made.base);
    let content = bench.read(&after)?;
    for (sector, id) in content.iter().enumerate() {
        if !run.allows(sector, *id, cut) {
            return Err(format!("sector {sector} holds {id}"));
        }
    }
    if number.is_multiple_of(SNAPSHOTS_EVERY) {
        let listed = open(&after, Access::ReadOnly).format.list_snapshots().map_err(|error| error.to_string())?;
        let listed: Vec<String> = listed.into_iter().map(|snapshot| snapshot.id).collect();
        run.judge_snapshots(cut, &listed, |id| {
            let disk = after.disk_with::<Qcow2>(IMAGE, Access::ReadOnly, |image| image.select_snapshot(id).map(|_| ()));
            let mut disk = disk.map_err(|error| format!("snapshot {id}: {error}"))?;
            read_all(&mut disk, bench.template.size, bench.made, bench.template)
        })?;
    }
    if number % RECOVER_EVERY == RECOVER_EVERY - 1 {
        recover(bench, &after, &content, random)?;
    }
    Ok(())
}

/// The state is written again, and closed; and the power fails in the middle of that.
fn recover(bench: &mut Bench<'_>, after: &Storage, old: &[u64], random: &mut Random) -> Result<(), String> {
    let Bench { template, made, .. } = *bench;
    let before: Files = [after.bytes(IMAGE), after.bytes(DATA)];
    let mut new = old.to_vec();
    let mut disk = open(after, Access::ReadWrite);
    let first = random.below(new.len() as u64) as usize;
    let last = (first + random.below(3 * template.cluster / SECTOR as u64) as usize + 1).min(new.len());
    new[first..last].fill(9_000_000 + random.below(1_000_000));
    disk.write_over(
        (first * SECTOR) as u64,
        &sectors(new[first..last].iter().copied()),
        &mut below(&made.base, template.backing),
    )
    .and_then(|()| disk.flush())
    .and_then(|()| disk.format.finish())
    .map_err(|error| format!("recovery: {error}"))?;
    let context = |why: String| format!("recovery of {first}..{last}: {why}");
    bench.check(&after.bytes(IMAGE)).map_err(context)?;
    if bench.read(after).map_err(context)? != new {
        return Err(context("the content is wrong".to_owned()));
    }
    let changes = after.take_changes_of(&[IMAGE, DATA]);
    bench.tally.changes += changes.len() as u64;
    let mut states = States::new(before, &changes);
    for cut in States::cuts(&changes, RECOVERY_CUTS, random) {
        let context = |why: String| context(format!("cut at {cut} of {}: {why}", changes.len()));
        let state = states.at(cut, random);
        bench.check(&state[0]).map_err(context)?;
        let content = bench.read(&storage(state, &made.base)).map_err(context)?;
        if let Some(sector) = (0..content.len()).find(|at| content[*at] != old[*at] && content[*at] != new[*at]) {
            return Err(context(format!("sector {sector} holds {}", content[sector])));
        }
    }
    if after.bytes(BASE) != made.base {
        return Err(context("the base was changed".to_owned()));
    }
    Ok(())
}
