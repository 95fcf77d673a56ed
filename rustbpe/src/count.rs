//! Counting chunks: the first half of training. Texts come one by one and are forgotten once counted, so that memory
//! grows with the number of distinct chunks and not with the text.
//!
//! The thread that has the texts gathers about a megabyte at a time and hands it to worker threads through a bounded
//! channel; each worker counts into a map of its own, and the maps are added up, in pairs, at the end. Addition does
//! not depend on order, so the counts are the same on any number of threads.

use std::sync::mpsc::{sync_channel, Receiver};
use std::sync::Mutex;
use std::thread;

use crate::split::Splitter;
use crate::table::BytesMap;

/// How often each distinct chunk was seen.
pub type ChunkCounts = BytesMap<u64>;

const BATCH_BYTES: usize = 1 << 20;

/// Texts end to end, with the place where each one ends: chunks never cross a text's end.
#[derive(Default)]
pub struct Batch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Batch {
    /// Append one text.
    pub fn push(&mut self, text: &[u8]) {
        self.bytes.extend_from_slice(text);
        self.ends.push(self.bytes.len());
    }

    /// How many bytes of text it holds.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it is time to hand it over.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= BATCH_BYTES || self.ends.len() >= BATCH_BYTES / 16
    }

    /// Whether there is no text in it.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn count_into(&self, counts: &mut ChunkCounts) {
        let splitter = Splitter::default();
        let mut start = 0;
        for &end in &self.ends {
            let text = &self.bytes[start..end];
            splitter.for_each(text, |from, to| *counts.entry(text, from, to) += 1);
            start = end;
        }
    }
}

/// Count the chunks of every batch that `next_batch` gives until it gives None, on `threads` threads beside the
/// calling one. An error of `next_batch` ends the counting and is returned.
pub fn count_chunks<E>(
    threads: usize,
    mut next_batch: impl FnMut() -> Result<Option<Batch>, E>,
) -> Result<ChunkCounts, E> {
    let threads = threads.max(1);
    let (sender, receiver) = sync_channel::<Batch>(threads);
    let receiver = Mutex::new(receiver);
    let maps = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| count_received(&receiver))).collect();
        let outcome = loop {
            match next_batch() {
                Ok(Some(batch)) => sender.send(batch).expect("the receiver outlives the sender"),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        drop(sender); // the workers end when the channel is empty
        let maps: Vec<_> = workers.into_iter().map(|worker| worker.join().expect("counting does not panic")).collect();
        outcome.map(|()| maps)
    })?;
    Ok(sum(maps))
}

fn count_received(receiver: &Mutex<Receiver<Batch>>) -> ChunkCounts {
    let mut counts = ChunkCounts::default();
    loop {
        let received = receiver.lock().expect("no worker panics while it waits").recv();
        match received {
            Ok(batch) => batch.count_into(&mut counts),
            Err(_) => return counts,
        }
    }
}

/// Add the maps up in pairs, the pairs in parallel.
fn sum(mut maps: Vec<ChunkCounts>) -> ChunkCounts {
    while maps.len() > 1 {
        let odd = if maps.len() % 2 == 1 { maps.pop() } else { None };
        maps = thread::scope(|scope| {
            let mut additions = Vec::new();
            while let (Some(a), Some(b)) = (maps.pop(), maps.pop()) {
                let (mut large, small) = if a.size() >= b.size() { (a, b) } else { (b, a) };
                additions.push(scope.spawn(move || {
                    large.absorb(small);
                    large
                }));
            }
            additions.into_iter().map(|addition| addition.join().expect("adding does not panic")).collect()
        });
        maps.extend(odd);
    }
    maps.pop().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn counted(threads: usize, texts: &[String]) -> HashMap<Vec<u8>, u64> {
        let mut texts = texts.iter();
        let counts = count_chunks(threads, || {
            let mut batch = Batch::default();
            for text in texts.by_ref().take(3) {
                batch.push(text.as_bytes());
            }
            Ok::<_, ()>((!batch.is_empty()).then_some(batch))
        });
        let mut found = HashMap::new();
        counts.expect("no error").for_each(|bytes, count| {
            found.insert(bytes.to_vec(), count);
        });
        found
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let texts: Vec<String> = (0..500).map(|i| format!("text {i} of many, {} and more\n", i * i)).collect();
        let one = counted(1, &texts);
        assert_eq!(one[b" of".as_slice()], 500);
        for threads in [2, 3, 5, 16] {
            assert_eq!(counted(threads, &texts), one);
        }
    }

    #[test]
    fn chunks_do_not_cross_texts() {
        let counts = counted(2, &["ab".into(), "cd".into(), String::new(), "ab".into()]);
        assert_eq!(counts, HashMap::from([(b"ab".to_vec(), 2), (b"cd".to_vec(), 1)]));
    }

    #[test]
    fn an_error_ends_the_counting() {
        let mut calls = 0;
        let outcome = count_chunks(2, || {
            calls += 1;
            let mut batch = Batch::default();
            batch.push(b"text");
            if calls < 5 {
                Ok(Some(batch))
            } else {
                Err("enough")
            }
        });
        assert_eq!(outcome.err(), Some("enough"));
    }
}
