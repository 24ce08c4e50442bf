//! The CUDA sources compile, for every kind of specialisation, on a machine without a GPU.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use sluice_kernels::device::cuda::compile::{CompileError, Compiler, LIBRARY_VARIABLE, Target};
use sluice_kernels::device::cuda::module::{Source, Specialisation};
use sluice_kernels::label::LabelPlan;
use sluice_kernels::shape::RowType;

/// The oldest that is served, a small chip (which has less shared memory), and the one that is measured.
const TARGETS: [Target; 3] = [Target { capability: (8, 0) }, Target { capability: (9, 0) }, Target { capability: (8, 9) }];

/// The compiler. Where the environment names one it must be there; otherwise this machine may have none, and we say so.
fn compiler() -> Option<Compiler> {
    match Compiler::find() {
        Ok(compiler) => Some(compiler.with_cache(None)),
        Err(error) if std::env::var_os(LIBRARY_VARIABLE).is_some() => panic!("{LIBRARY_VARIABLE} names no NVRTC: {error}"),
        Err(error) => {
            eprintln!("NOT COVERED: compiling the CUDA sources. {error}. benches/all_tests.sh fetches NVRTC and sets {LIBRARY_VARIABLE}.");
            None
        }
    }
}

/// Plans of every width and of the half vector, that fit `head_dim`.
fn plans(head_dim: u16) -> Vec<LabelPlan> {
    let named = ["8@16+8@8+16@4+24@2", "40@8", "8@2", "16@16+24@2"].map(|plan| plan.parse().expect("a plan"));
    [LabelPlan::small(head_dim), LabelPlan::large(head_dim)].into_iter().chain(named).collect()
}

/// Every pair of (row type, channels) for every target, with groups and plans in turn.
fn specialisations() -> Vec<(Specialisation, Target)> {
    let mut all = Vec::new();
    for (t, row_type) in [RowType::F32, RowType::F16, RowType::Bf16, RowType::Fp8].into_iter().enumerate() {
        for (d, head_dim) in [64u16, 96, 128, 256].into_iter().enumerate() {
            let plans = plans(head_dim);
            for (turn, target) in TARGETS.into_iter().enumerate() {
                let group = [1, 2, 4, 7, 8, 16][(t + 2 * d + 3 * turn) % 6];
                let plan = plans[(d + 3 * turn + t) % plans.len()].clone();
                let specialisation =
                    Specialisation { head_dim: usize::from(head_dim), row_type, group, plan: Some(plan), replays_trace: false };
                all.push((specialisation, target));
            }
        }
    }
    all
}

#[test]
fn every_source_compiles_for_every_specialisation() {
    let Some(compiler) = compiler() else { return };
    let start = Instant::now();
    let all = specialisations();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(specialisation) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    compile_all(&compiler, specialisation);
                }
            });
        }
    });
    println!("compiled {} modules in {:.1?}", all.len() * Source::ALL.len(), start.elapsed());
}

fn compile_all(compiler: &Compiler, (specialisation, target): &(Specialisation, Target)) {
    for source in Source::ALL {
        let cubin = source.compile(compiler, specialisation, *target).expect("the source compiles");
        assert!(cubin.starts_with(b"\x7fELF"), "{} for {target}", source.name());
    }
}

#[test]
fn the_compilers_words_reach_the_error() {
    let Some(compiler) = compiler() else { return };
    let no_plan = Specialisation { head_dim: 64, row_type: RowType::F16, group: 1, plan: None, replays_trace: false };
    let error = Source::Label.compile(&compiler, &no_plan, TARGETS[0]).expect_err("labels need a plan");
    let CompileError::Source { ref name, ref log, .. } = error else { panic!("{error}") };
    assert_eq!(name, "label.cu");
    assert!(log.contains("N_GROUPS") && error.to_string().contains("sm_80"), "{error}");
}

/// The only file of a folder.
fn only_file(folder: &Path) -> std::path::PathBuf {
    let files: Vec<_> = std::fs::read_dir(folder).expect("folder").map(|entry| entry.expect("entry").path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn a_cached_module_is_read_and_a_damaged_one_compiled_anew() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().expect("folder");
    let compiler = compiler.with_cache(Some(folder.path().join("a").join("b")));
    let (specialisation, _) = &specialisations()[3];
    let compile = || Source::Label.compile(&compiler, specialisation, TARGETS[1]).expect("it compiles");
    let cubin = compile();
    let file = only_file(&folder.path().join("a").join("b"));
    let whole = std::fs::read(&file).expect("cache file");

    // What is read is the file: one with other content and its right checksum is believed.
    let other = b"not machine code";
    let head = whole.len() - cubin.len() - 32;
    let forged = [&whole[..head], blake3::hash(other).as_bytes(), other].concat();
    std::fs::write(&file, forged).expect("write");
    assert_eq!(compile(), other);

    for damage in [0, head + 3, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[damage] ^= 1;
        std::fs::write(&file, bytes).expect("write");
        assert_eq!(compile(), cubin, "byte {damage} was changed");
        assert_eq!(std::fs::read(&file).expect("cache file"), whole, "the file is whole again");
    }
    std::fs::write(&file, &whole[..whole.len() / 2]).expect("write");
    assert_eq!(compile(), cubin, "half of the file was missing");

    // Another target is another file; an unwritable folder is no error.
    Source::Label.compile(&compiler, specialisation, TARGETS[0]).expect("it compiles");
    assert_eq!(std::fs::read_dir(folder.path().join("a").join("b")).expect("folder").count(), 2);
    let compiler = compiler.with_cache(Some(file.join("a file is no folder")));
    assert_eq!(Source::Label.compile(&compiler, specialisation, TARGETS[1]).expect("it compiles"), cubin);
}
