//! Encoding and decoding with a learned vocabulary.
//!
//! A chunk that is a token is that token. In any other, the adjacent pair that makes the token of the lowest rank is
//! merged, the leftmost first, until no pair makes a token: what tiktoken does, with three things that make it faster:
//! ids of pairs are looked up instead of bytes; a chunk of up to 15 bytes is one number (see `table`); and what was
//! merged a moment ago is remembered in a small cache.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::thread;

use crate::split::Splitter;
use crate::table::{hash, pack, BytesMap, PairMap, PACKED_BYTES};

const NONE: u32 = u32::MAX;
const CACHED_IDS: usize = 7;
const CACHE_SLOTS: usize = 1 << 14;
const LONG_CHUNK: usize = 256; // from here on a heap (n log n) beats looking for the smallest (n squared, but tiny)

/// A remembered chunk and its ids.
#[derive(Clone, Copy)]
struct Remembered {
    key: u128,
    ids: [u32; CACHED_IDS],
    length: u32,
}

/// What one thread needs to encode: a cache and room to merge in.
struct Scratch {
    cache: Vec<Remembered>, // a chunk has one slot; the last one stays
    ids: Vec<u32>,
    ranks: Vec<u32>,
}

impl Scratch {
    fn new() -> Self {
        let empty = Remembered { key: 0, ids: [0; CACHED_IDS], length: 0 };
        Self { cache: vec![empty; CACHE_SLOTS], ids: Vec::new(), ranks: Vec::new() }
    }
}

/// Tokens by id, and the three maps that encoding needs. Ids are ranks: a lower one is merged first.
pub struct Vocabulary {
    bytes: Vec<u8>, // all tokens end to end
    ends: Vec<usize>,
    ordinary: usize, // ids below this are merged to; those from it on are special and only decoded
    ids: BytesMap<u32>,
    byte_ids: [u32; 256],
    byte_pairs: Vec<u32>, // [left byte << 8 | right byte] -> id; the first look at a chunk asks nothing else
    pairs: PairMap,       // (left id, right id) -> id
    idle: Mutex<Vec<Scratch>>,
}

impl Vocabulary {
    /// Build the maps from the tokens in order of rank and the names of the special tokens, whose ids follow.
    ///
    /// The error says in one line what is wrong: an empty token, the same twice, or a byte that is no token.
    pub fn new(tokens: &[Vec<u8>], special: &[String]) -> Result<Self, String> {
        let mut ids = BytesMap::default();
        for (rank, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(format!("the token of rank {rank} is empty"));
            }
            if let Some(first) = ids.get(token) {
                return Err(format!("ranks {first} and {rank} are the same token"));
            }
            *ids.entry(token, 0, token.len()) = rank as u32;
        }
        let mut byte_ids = [NONE; 256];
        for (byte, id) in byte_ids.iter_mut().enumerate() {
            *id = ids.get(&[byte as u8]).ok_or_else(|| format!("no token for the byte 0x{byte:02x}"))?;
        }
        let mut byte_pairs = vec![NONE; 1 << 16];
        let mut pairs = PairMap::default();
        for (rank, token) in tokens.iter().enumerate() {
            if let [left, right] = token[..] {
                byte_pairs[usize::from(left) << 8 | usize::from(right)] = rank as u32;
            }
            for cut in 1..token.len() {
                if let (Some(left), Some(right)) = (ids.get(&token[..cut]), ids.get(&token[cut..])) {
                    pairs.insert(left, right, rank as u32);
                }
            }
        }
        let all = tokens.iter().map(Vec::as_slice).chain(special.iter().map(String::as_bytes));
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for token in all {
            bytes.extend_from_slice(token);
            ends.push(bytes.len());
        }
        let ordinary = tokens.len();
        Ok(Self { bytes, ends, ordinary, ids, byte_ids, byte_pairs, pairs, idle: Mutex::default() })
    }

    /// How many ids there are, special ones included.
    pub fn size(&self) -> usize {
        self.ends.len()
    }

    /// How many ids are not special.
    pub fn ordinary(&self) -> usize {
        self.ordinary
    }

    /// The bytes of a token (of a special one: its name); None if there is no such id.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let end = *self.ends.get(id as usize)?;
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        Some(&self.bytes[start..end])
    }

    /// The bytes that the ids stand for; the error is the first id that there is not.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, u32> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.token(id).ok_or(id)?);
        }
        Ok(bytes)
    }

    /// Append the ids of one text, or of any bytes.
    pub fn encode(&self, text: &[u8], out: &mut Vec<u32>) {
        let mut scratch = self.take_scratch();
        self.encode_with(&mut scratch, text, out);
        self.give_back(scratch);
    }

    /// The ids of each text, between `prepend` and `append`, on up to `threads` threads.
    pub fn encode_batch(&self, texts: &[&[u8]], threads: usize, around: (Option<u32>, Option<u32>)) -> Vec<Vec<u32>> {
        let one = |scratch: &mut Scratch, text: &[u8]| {
            let mut ids = Vec::with_capacity(text.len() / 3 + 2);
            ids.extend(around.0);
            self.encode_with(scratch, text, &mut ids);
            ids.extend(around.1);
            ids
        };
        let next = AtomicUsize::new(0);
        let worker = || {
            let mut scratch = self.take_scratch();
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(text) = texts.get(index) else { break };
                done.push((index, one(&mut scratch, text)));
            }
            self.give_back(scratch);
            done
        };
        let mut encoded = vec![Vec::new(); texts.len()];
        let threads = threads.clamp(1, texts.len().max(1));
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(worker)).collect();
            let mut done = worker(); // the calling thread is one of them
            done.extend(others.into_iter().flat_map(|other| other.join().expect("encoding does not panic")));
            for (index, ids) in done {
                encoded[index] = ids;
            }
        });
        encoded
    }

    fn take_scratch(&self) -> Scratch {
        let idle = self.idle.lock().expect("held only to push and pop").pop();
        idle.unwrap_or_else(Scratch::new)
    }

    fn give_back(&self, scratch: Scratch) {
        self.idle.lock().expect("held only to push and pop").push(scratch);
    }

    fn encode_with(&self, scratch: &mut Scratch, text: &[u8], out: &mut Vec<u32>) {
        Splitter::default().for_each(text, |start, end| {
            if end - start <= PACKED_BYTES {
                let key = pack(text, start, end);
                match self.ids.get_packed(key) {
                    Some(id) => out.push(id),
                    None => self.encode_packed(scratch, key, &text[start..end], out),
                }
            } else {
                let chunk = &text[start..end];
                match self.ids.get(chunk) {
                    Some(id) => out.push(id),
                    None if chunk.len() < LONG_CHUNK => self.merge(scratch, chunk, out),
                    None => self.merge_long(chunk, out),
                }
            }
        });
    }

    fn encode_packed(&self, scratch: &mut Scratch, key: u128, chunk: &[u8], out: &mut Vec<u32>) {
        let slot = hash(key) as usize % CACHE_SLOTS;
        let remembered = &scratch.cache[slot];
        if remembered.key == key {
            out.extend_from_slice(&remembered.ids[..remembered.length as usize]);
            return;
        }
        let first = out.len();
        self.merge(scratch, chunk, out);
        let ids = &out[first..];
        if ids.len() <= CACHED_IDS {
            let remembered = &mut scratch.cache[slot];
            remembered.key = key;
            remembered.length = ids.len() as u32;
            remembered.ids[..ids.len()].copy_from_slice(ids);
        }
    }

    #[inline(always)]
    fn pair_rank(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(left, right).unwrap_or(NONE)
    }

    fn byte_pair_rank(&self, two: &[u8]) -> u32 {
        self.byte_pairs[usize::from(two[0]) << 8 | usize::from(two[1])]
    }

    /// Merge the bytes of a short chunk by looking through all its pairs for the one of the lowest rank.
    fn merge(&self, scratch: &mut Scratch, chunk: &[u8], out: &mut Vec<u32>) {
        let Scratch { ids, ranks, .. } = scratch; // ranks[i] is that of the pair (ids[i], ids[i + 1])
        ids.clear();
        ids.extend(chunk.iter().map(|&byte| self.byte_ids[usize::from(byte)]));
        ranks.clear();
        ranks.extend(chunk.windows(2).map(|two| self.byte_pair_rank(two)));
        loop {
            let (mut at, mut lowest) = (0, NONE);
            for (i, &rank) in ranks.iter().enumerate() {
                if rank < lowest {
                    (at, lowest) = (i, rank);
                }
            }
            if lowest == NONE {
                break;
            }
            ids[at] = lowest;
            ids.remove(at + 1);
            ranks.remove(at);
            if at < ranks.len() {
                ranks[at] = self.pair_rank(lowest, ids[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.pair_rank(ids[at - 1], lowest);
            }
        }
        out.extend_from_slice(ids);
    }

    /// The same for a chunk of any length, in n log n: a linked list of tokens and a heap of pairs.
    fn merge_long(&self, chunk: &[u8], out: &mut Vec<u32>) {
        assert!(chunk.len() < NONE as usize, "a chunk of 4 GiB");
        let length = chunk.len();
        let mut ids: Vec<u32> = chunk.iter().map(|&byte| self.byte_ids[usize::from(byte)]).collect();
        let mut next: Vec<u32> = (1..=length as u32).collect();
        let mut previous: Vec<u32> = (0..length as u32).map(|i| i.wrapping_sub(1)).collect();
        let mut ranks: Vec<u32> = chunk.windows(2).map(|two| self.byte_pair_rank(two)).collect();
        ranks.push(NONE);
        let entry = |rank: u32, at: usize| Reverse(u64::from(rank) << 32 | at as u64);
        let mut heap: BinaryHeap<Reverse<u64>> =
            ranks.iter().enumerate().filter(|(_, &rank)| rank != NONE).map(|(at, &rank)| entry(rank, at)).collect();
        while let Some(Reverse(lowest)) = heap.pop() {
            let (rank, at) = ((lowest >> 32) as u32, lowest as u32 as usize);
            if ranks[at] != rank {
                continue; // one of the two was merged since
            }
            let gone = next[at] as usize;
            let after = next[gone] as usize;
            ids[at] = rank;
            ranks[gone] = NONE;
            next[at] = after as u32;
            ranks[at] = NONE;
            if after < length {
                previous[after] = at as u32;
                ranks[at] = self.pair_rank(rank, ids[after]);
                if ranks[at] != NONE {
                    heap.push(entry(ranks[at], at));
                }
            }
            if previous[at] != NONE {
                let before = previous[at] as usize;
                ranks[before] = self.pair_rank(ids[before], rank);
                if ranks[before] != NONE {
                    heap.push(entry(ranks[before], before));
                }
            }
        }
        let mut at = 0;
        while at < length {
            out.push(ids[at]);
            at = next[at] as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::{count_chunks, Batch};
    use crate::merge::Merger;

    const TEXT: &str = "Some text, some more text; sometimes 1234 numbers & signs!!\n\n  aaaaaaaaaaaaaaaaaaaaaaaaa \
                        漢字 漢字 émigré, naïveté 🙂🙂 the end of the text; the text ends there.";

    fn vocabulary(size: usize) -> Vocabulary {
        let mut batch = Batch::default();
        batch.push(TEXT.as_bytes());
        let mut batch = Some(batch);
        let counts = count_chunks(1, || Ok::<_, ()>(batch.take())).expect("no error");
        let mut merger = Merger::new(&counts).expect("few chunks");
        merger.grow(size, |_| Ok::<_, ()>(())).expect("no error");
        Vocabulary::new(&merger.into_tokens(), &["<|bos|>".into()]).expect("a valid vocabulary")
    }

    fn encode(vocabulary: &Vocabulary, text: &[u8]) -> Vec<u32> {
        let mut ids = Vec::new();
        vocabulary.encode(text, &mut ids);
        ids
    }

    #[test]
    fn decoding_gives_back_any_bytes() {
        let every_byte: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
        for size in [256, 270, 400] {
            let vocabulary = vocabulary(size);
            for text in [TEXT.as_bytes(), b"", b" ", b"\xFF\xC0 text", &every_byte] {
                let ids = encode(&vocabulary, text);
                assert_eq!(vocabulary.decode(&ids).as_deref(), Ok(text));
                assert_eq!(encode(&vocabulary, text), ids, "from the cache");
            }
        }
    }

    #[test]
    fn special_tokens_are_decoded_but_never_encoded() {
        let vocabulary = vocabulary(300);
        let bos = vocabulary.ordinary() as u32;
        assert_eq!(vocabulary.token(bos), Some(b"<|bos|>".as_slice()));
        assert_eq!(vocabulary.decode(&[bos, bos + 1]), Err(bos + 1));
        assert!(encode(&vocabulary, b"<|bos|>").iter().all(|&id| id < bos));
    }

    #[test]
    fn a_heap_and_a_search_merge_alike() {
        let vocabulary = vocabulary(400);
        let mut scratch = Scratch::new();
        let mut state = 3_u64;
        for length in 1..600 {
            let chunk: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    b"aaaetxsom "[(state >> 33) as usize % 10]
                })
                .collect();
            let (mut short, mut long) = (Vec::new(), Vec::new());
            vocabulary.merge(&mut scratch, &chunk, &mut short);
            vocabulary.merge_long(&chunk, &mut long);
            assert_eq!(short, long, "{chunk:?}");
        }
    }

    #[test]
    fn batches_equal_single_texts_on_any_number_of_threads() {
        let vocabulary = vocabulary(350);
        let texts: Vec<String> = (0..100).map(|i| TEXT.chars().skip(i).take(i * 3).collect()).collect();
        let bytes: Vec<&[u8]> = texts.iter().map(String::as_bytes).collect();
        let expected: Vec<Vec<u32>> =
            bytes.iter().map(|text| [vec![7], encode(&vocabulary, text), vec![9]].concat()).collect();
        for threads in [0, 1, 2, 7, 200] {
            assert_eq!(vocabulary.encode_batch(&bytes, threads, (Some(7), Some(9))), expected);
        }
        assert!(vocabulary.encode_batch(&[], 4, (None, None)).is_empty());
    }

    #[test]
    fn what_is_wrong_with_a_vocabulary_is_said() {
        let bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let refused = |tokens: &[Vec<u8>]| Vocabulary::new(tokens, &[]).err().expect("an error");
        assert_eq!(refused(&bytes[..255]), "no token for the byte 0xff");
        assert_eq!(refused(&[bytes.clone(), vec![vec![]]].concat()), "the token of rank 256 is empty");
        assert_eq!(refused(&[bytes, vec![vec![65]]].concat()), "ranks 65 and 256 are the same token");
    }
}
