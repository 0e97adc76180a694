//! Compilers for components of strangers: this program, started again for each, with nothing but a pipe.
//!
//! They are started before the walls go up, which let nobody start a program; so each command says beforehand how
//! many components of strangers it has. The built-in ones are compiled in this process.

use std::process::ExitCode;
use std::sync::{Arc, LazyLock};

use blockhouse_sandbox::{CompilerProcess, Limits, Sandbox, serve_compiler};
use blockhouse_walls::Walls;

/// The first argument of a compiler. Not for people, and in no help.
const ARGUMENT: &str = "--compile-for-parent";

#[allow(unsafe_code)]
static COMPILERS: LazyLock<Arc<CompilerProcess>> = LazyLock::new(|| {
    // SAFETY: `serve_if_asked` is the first thing that `main` calls.
    Arc::new(unsafe { CompilerProcess::this_program(ARGUMENT) })
});

/// Does the work of a compiler if this process is one.
pub(crate) fn serve_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    // What a kernel lacks is said by the program that started this one.
    let walls = || drop(Walls::confine_compiler());
    Some(ExitCode::from(serve_compiler(arguments, walls)))
}

/// Starts as many compilers as there are components of strangers.
pub(crate) fn prepare(strangers: usize, limits: &Limits) -> anyhow::Result<()> {
    for _ in 0..strangers {
        COMPILERS.prepare(limits)?;
    }
    Ok(())
}

/// A sandbox that has strangers' components compiled by them.
pub(crate) fn sandbox(limits: Limits) -> anyhow::Result<Sandbox> {
    Ok(Sandbox::new(limits)?.compiler(Arc::clone(&*COMPILERS) as _))
}

/// Ends those that nobody needed: their components were kept from before.
pub(crate) fn dismiss() {
    COMPILERS.dismiss();
}
