//! One of several workers that share a sequence, each with lanes of its own, for the test of tensor parallelism. It opens a sequence or joins
//! one, says `ready SEQUENCE GENERATION LENGTH`, and then does what the lines of its input say, answering with one line each:
//!
//! ```text
//! text SEED FROM UPTO    the tokens from FROM on are those of SEED, up to UPTO          text UPTO
//! fill UPTO              append rows without attending                                  length LENGTH
//! decode UPTO            sparse steps; `out POSITION LAYER OUTPUT LOG_SUM_EXP` before   length LENGTH
//! fork POSITION          fork, and let go of the fork                                   length LENGTH
//! truncate POSITION      truncate                                                       length LENGTH
//! begin POSITION         give up tokens, so that another worker may truncate            length LENGTH
//! end done|refused       follow, or take back                                           length LENGTH
//! close                  end the lease, or leave                                        closed
//! ```
//! What is refused is answered with `refused CODE MESSAGE`.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::Write as _;
use std::ops::Range;
use std::process::ExitCode;

use sluice_client::{AttendMode, Client, ClientError, OpenOptions, Session, Step, StepOut, Truncation};
use support::daemon::quick;
use support::rows::{path_hashes, query_of, rows_of, token_ids};
use support::{direct, lane_shape, options, register, sparse_settings};

struct LaneWorker {
    session: Session,
    lanes: Range<u16>,
    ids: Vec<u32>,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, model, first_lane, end_lane, sequence, generation] = words.as_slice() else {
        eprintln!("usage: lane_worker SOCKET MODEL FIRST_LANE END_LANE SEQUENCE|0 GENERATION|0");
        return ExitCode::FAILURE;
    };
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let lanes = number(first_lane) as u16..number(end_lane) as u16;
    let client = Client::connect(socket, quick()).expect("connect");
    let model = register(&client, model, &lane_shape());
    let options = OpenOptions { lanes: Some(lanes.clone()), ..options(direct(), sparse_settings()) };
    let session = match number(sequence) {
        0 => client.open(&model, &[], &options),
        id => client.join(&model, id, number(generation), &options),
    };
    let session = session.expect("open or join");
    say(&format!("ready {} {} {}", session.sequence_id(), session.generation(), session.length()));
    LaneWorker { session, lanes, ids: Vec::new() }.serve();
    ExitCode::SUCCESS
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).expect("somebody reads");
}

fn hex(values: &[f32]) -> String {
    values.iter().map(|value| format!("{:08x}", value.to_bits())).collect()
}

impl LaneWorker {
    fn serve(mut self) {
        for line in std::io::stdin().lines() {
            let line = line.expect("a line");
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<usize>().expect("a number");
            let done = match words[0] {
                "text" => {
                    self.ids.truncate(number(2));
                    self.ids.extend(&token_ids(number(1) as u64, number(3))[number(2)..]);
                    say(&format!("text {}", self.ids.len()));
                    continue;
                }
                "close" => {
                    self.session.close().expect("close");
                    return say("closed");
                }
                "fill" => self.fill(number(1)),
                "decode" => self.decode(number(1)),
                "fork" => self.session.fork(number(1)).map(drop),
                "truncate" => self.session.truncate(number(1)),
                "begin" => self.session.begin_truncate(number(1)),
                _ => self.session.end_truncate(if words[1] == "done" { Truncation::Done } else { Truncation::Refused }),
            };
            match done {
                Ok(()) => say(&format!("length {}", self.session.length())),
                Err(ClientError::Refused { code, message, .. }) => say(&format!("refused {code:?} {message}")),
                Err(error) => say(&format!("refused Client {error}")),
            }
        }
    }

    /// The own lanes' part of something `[lane][..]` or `[head][..]`, heads lying by lane.
    fn own<'a, T>(&self, all: &'a [T], lanes: usize) -> &'a [T] {
        let share = all.len() / lanes;
        &all[usize::from(self.lanes.start) * share..usize::from(self.lanes.end) * share]
    }

    fn fill(&mut self, end: usize) -> Result<(), ClientError> {
        let (shape, paths) = (lane_shape(), path_hashes(&self.ids));
        while self.session.length() < end {
            let positions = self.session.length()..end.min(self.session.length() + 100);
            self.session.begin(&self.ids[positions.clone()])?;
            for layer in 0..shape.layers.len() {
                let rows = rows_of(&paths[positions.clone()], layer, &shape);
                let rows = self.own(&rows, shape.layers[layer].lanes()).to_vec();
                self.session.append(layer, positions.start, &rows)?;
            }
        }
        Ok(())
    }

    fn decode(&mut self, end: usize) -> Result<(), ClientError> {
        let (shape, paths) = (lane_shape(), path_hashes(&self.ids));
        while self.session.length() < end {
            let position = self.session.length();
            self.session.begin(&self.ids[position..position + 1])?;
            for (layer, layer_shape) in shape.layers.iter().enumerate() {
                let lanes = layer_shape.lanes();
                let (rows, queries) = (rows_of(&paths[position..position + 1], layer, &shape), query_of(position, layer, layer_shape));
                let (rows, queries) = (self.own(&rows, lanes), self.own(&queries, lanes));
                let (mut output, mut lse) =
                    (vec![f32::NAN; queries.len()], vec![f32::NAN; queries.len() / usize::from(layer_shape.head_dim)]);
                let step = Step { layer, first_position: position, queries, rows: Some(rows), attend: AttendMode::Sparse };
                self.session.step(&step, StepOut { output: &mut output, log_sum_exp: &mut lse, report: None })?;
                say(&format!("out {position} {layer} {} {}", hex(&output), hex(&lse)));
            }
        }
        Ok(())
    }
}
