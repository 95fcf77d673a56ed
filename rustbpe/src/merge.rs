//! Learning merges: the second half of training. Start from bytes; again and again replace the most frequent pair of
//! adjacent tokens by a new token. Ties go to the smaller pair of ids, so the result is unique.
//!
//! (Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016, on bytes.)
//!
//! Four observations make it fast:
//!
//! 1. All distinct chunks stand in one array of cells, a cell a byte, with a wall before and after each chunk. A token
//!    has its id in its first and its last cell, so that both neighbours of a token are one addition and one load away.
//! 2. A pair comes into being only in the merge that makes the newer of its two tokens. So the list of places of a pair
//!    is written once, in ascending order, and afterwards only loses places: those are recognized when they are visited.
//!    All lists together hold at most three places a cell, in one growing arena.
//! 3. All new pairs of a merge (a, b) -> c are (x, c) or (c, y), and each takes its counts from (x, a) or (b, y). They
//!    are gathered per x and per y, so that a pair is looked up once a merge and not once an occurrence.
//! 4. The largest count never rises. So a queue needs order only among pairs with counts of the largest power of two:
//!    a heap for those, and an unsorted bin for each lower power. Most pairs never leave their bin.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::count::ChunkCounts;
use crate::table::PairMap;

const WALL: u32 = u32::MAX;
const INSIDE: u32 = u32::MAX - 1; // the first cell of a token that became the right part of another
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Cell {
    token: u32,
    chunk: u32,
}

struct Pair {
    left: u32,
    right: u32,
    count: u64,
    first_place: usize, // its places are arena[first_place..][..places]
    places: u32,
}

/// The neighbours on one side of the places where a merge happens: how often each token stands there, and where.
#[derive(Default)]
struct Neighbours {
    group_of: Vec<u32>, // by token; NONE outside a merge
    groups: Vec<Group>,
    places: Vec<(u32, u32)>, // (group, place of the pair with the new token)
}

#[derive(Clone, Copy)]
struct Group {
    token: u32,
    count: u64,
    places: u32,
}

impl Neighbours {
    #[inline(always)]
    fn add(&mut self, token: u32, count: u64, place: usize) {
        let mut group = self.group_of[token as usize];
        if group == NONE {
            group = self.groups.len() as u32;
            self.group_of[token as usize] = group;
            self.groups.push(Group { token, count: 0, places: 0 });
        }
        let known = &mut self.groups[group as usize];
        known.count += count;
        known.places += 1;
        self.places.push((group, place as u32));
    }

    /// Move the places to the arena, those of one group together and in their order; return each group with the index
    /// in the arena where its places begin, and forget everything.
    fn settle(&mut self, arena: &mut Vec<u32>) -> Vec<(Group, usize)> {
        let mut at = arena.len();
        let mut settled = Vec::with_capacity(self.groups.len());
        let mut cursors = Vec::with_capacity(self.groups.len());
        for group in self.groups.drain(..) {
            self.group_of[group.token as usize] = NONE;
            settled.push((group, at));
            cursors.push(at);
            at += group.places as usize;
        }
        arena.resize(at, 0);
        for (group, place) in self.places.drain(..) {
            let cursor = &mut cursors[group as usize];
            arena[*cursor] = place;
            *cursor += 1;
        }
        settled
    }
}

/// (count, (left, right), pair)
type Queued = (u64, Reverse<(u32, u32)>, u32);

/// Pairs by count, the largest first, ties by the smaller (left, right).
struct Queue {
    level: u32, // the heap holds the pairs whose count is at least 2^level
    heap: BinaryHeap<Queued>,
    bins: Vec<Vec<u32>>, // bins[k]: pairs whose count was in 2^k .. 2^(k+1)
}

impl Queue {
    fn new() -> Self {
        Self { level: u64::BITS, heap: BinaryHeap::new(), bins: vec![Vec::new(); u64::BITS as usize] }
    }

    fn push(&mut self, pair: u32, pairs: &[Pair]) {
        let Pair { left, right, count, .. } = pairs[pair as usize];
        if count == 0 {
            return;
        }
        let power = count.ilog2();
        if power >= self.level {
            self.heap.push((count, Reverse((left, right)), pair));
        } else {
            self.bins[power as usize].push(pair);
        }
    }

    /// The pair to merge next. Counts may have fallen since a pair was pushed: then it is pushed again.
    fn pop(&mut self, pairs: &[Pair]) -> Option<u32> {
        loop {
            while let Some((count, _, pair)) = self.heap.pop() {
                if pairs[pair as usize].count == count {
                    return Some(pair);
                }
                self.push(pair, pairs);
            }
            self.level = self.level.checked_sub(1)?;
            for pair in std::mem::take(&mut self.bins[self.level as usize]) {
                self.push(pair, pairs);
            }
        }
    }
}

/// The state of learning.
pub struct Merger {
    tokens: Vec<Vec<u8>>,
    lengths: Vec<u32>,
    cells: Vec<Cell>,
    counts: Vec<u64>, // by chunk
    pairs: Vec<Pair>,
    pair_index: PairMap,
    arena: Vec<u32>,
    queue: Queue,
    before: Neighbours,
    after: Neighbours,
}

impl Merger {
    /// Lay out the chunks and count the pairs of bytes. None if there are more than 2^32 - 2 bytes in distinct chunks.
    pub fn new(chunks: &ChunkCounts) -> Option<Self> {
        let mut bytes = 1;
        chunks.for_each(|chunk, _| bytes += chunk.len() + 1);
        if bytes >= INSIDE as usize {
            return None;
        }
        let mut cells = Vec::with_capacity(bytes);
        let mut counts = Vec::with_capacity(chunks.size());
        cells.push(Cell { token: WALL, chunk: 0 });
        chunks.for_each(|chunk, count| {
            let index = counts.len() as u32;
            counts.push(count);
            cells.extend(chunk.iter().map(|&byte| Cell { token: u32::from(byte), chunk: index }));
            cells.push(Cell { token: WALL, chunk: index });
        });
        let mut merger = Self {
            tokens: (0..=255).map(|byte| vec![byte]).collect(),
            lengths: vec![1; 256],
            cells,
            counts,
            pairs: Vec::new(),
            pair_index: PairMap::default(),
            arena: Vec::new(),
            queue: Queue::new(),
            before: Neighbours { group_of: vec![NONE; 256], ..Neighbours::default() },
            after: Neighbours { group_of: vec![NONE; 256], ..Neighbours::default() },
        };
        merger.count_byte_pairs();
        Some(merger)
    }

    fn count_byte_pairs(&mut self) {
        // the pairs of bytes are the neighbours of nothing: gathered under the number 256 left + right
        let mut gathered = Neighbours { group_of: vec![NONE; 1 << 16], ..Neighbours::default() };
        for (place, two) in self.cells.windows(2).enumerate() {
            if two[0].token != WALL && two[1].token != WALL {
                gathered.add(two[0].token << 8 | two[1].token, self.counts[two[0].chunk as usize], place);
            }
        }
        for (group, first_place) in gathered.settle(&mut self.arena) {
            self.add_pair(group.token >> 8, group.token & 255, group.count, first_place, group.places);
        }
    }

    fn add_pair(&mut self, left: u32, right: u32, count: u64, first_place: usize, places: u32) {
        if count == 0 {
            return;
        }
        let index = self.pairs.len() as u32;
        self.pairs.push(Pair { left, right, count, first_place, places });
        self.pair_index.insert(left, right, index);
        self.queue.push(index, &self.pairs);
    }

    fn take_from_pair(&mut self, left: u32, right: u32, count: u64) {
        // only the pair that is being merged may be gone already
        if let Some(index) = self.pair_index.get(left, right) {
            let pair = &mut self.pairs[index as usize];
            pair.count = pair.count.saturating_sub(count);
        }
    }

    /// Merge until there are `size` tokens, bytes included, or no pair is left. `progress(tokens)` is called after each
    /// merge; its error ends the merging and is returned.
    pub fn grow<E>(&mut self, size: usize, mut progress: impl FnMut(usize) -> Result<(), E>) -> Result<(), E> {
        while self.tokens.len() < size {
            let Some(pair) = self.queue.pop(&self.pairs) else { break };
            self.merge(pair as usize);
            progress(self.tokens.len())?;
        }
        Ok(())
    }

    /// The tokens so far; a token's id is its index.
    pub fn into_tokens(self) -> Vec<Vec<u8>> {
        self.tokens
    }

    fn merge(&mut self, pair: usize) {
        let Pair { left, right, first_place, places, .. } = self.pairs[pair];
        self.pairs[pair].count = 0;
        let new = self.tokens.len() as u32;
        let bytes = [self.tokens[left as usize].as_slice(), &self.tokens[right as usize]].concat();
        self.lengths.push(bytes.len() as u32);
        self.tokens.push(bytes);
        self.before.group_of.push(NONE);
        self.after.group_of.push(NONE);

        let (chained, chain) = self.rewrite(left, right, new, first_place..first_place + places as usize);

        for (group, first_place) in self.before.settle(&mut self.arena) {
            self.take_from_pair(group.token, left, group.count);
            self.add_pair(group.token, new, group.count, first_place, group.places);
        }
        for (group, first_place) in self.after.settle(&mut self.arena) {
            self.take_from_pair(right, group.token, group.count);
            let count = group.count - if group.token == left { chained } else { 0 };
            self.add_pair(new, group.token, count, first_place, group.places);
        }
        let first_place = self.arena.len();
        self.arena.extend_from_slice(&chain);
        self.add_pair(new, new, chained, first_place, chain.len() as u32);
    }

    /// Replace (left, right) by `new` at each of the places, from left to right, and gather the neighbours. Returns how
    /// often `new` came to stand right after `new`, and where: there the first of the two was counted as followed by
    /// `left`, which is gone now.
    fn rewrite(&mut self, left: u32, right: u32, new: u32, places: std::ops::Range<usize>) -> (u64, Vec<u32>) {
        let left_length = self.lengths[left as usize] as usize;
        let new_length = self.lengths[new as usize] as usize;
        let (mut chained, mut chain) = (0, Vec::new());
        for &place in &self.arena[places] {
            let place = place as usize;
            let middle = place + left_length;
            if self.cells[place].token != left || self.cells[middle].token != right {
                continue; // one of the two has become part of another token
            }
            let end = place + new_length;
            let count = self.counts[self.cells[place].chunk as usize];
            let (previous, next) = (self.cells[place - 1].token, self.cells[end].token);
            if previous == new {
                chained += count;
                chain.push((place - new_length) as u32);
            } else if previous != WALL {
                self.before.add(previous, count, place - self.lengths[previous as usize] as usize);
            }
            if next != WALL {
                self.after.add(next, count, place);
            }
            self.cells[place].token = new;
            self.cells[middle].token = INSIDE;
            self.cells[end - 1].token = new;
        }
        (chained, chain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn learn(chunks: &[(&[u8], u64)], size: usize) -> Vec<Vec<u8>> {
        let mut counts = ChunkCounts::default();
        for (chunk, count) in chunks {
            *counts.entry(chunk, 0, chunk.len()) += count;
        }
        let mut merger = Merger::new(&counts).expect("few chunks");
        merger.grow(size, |_| Ok::<_, ()>(())).expect("no error");
        merger.into_tokens()
    }

    /// The definition: recount everything before each merge.
    fn learn_slowly(chunks: &[(&[u8], u64)], size: usize) -> Vec<Vec<u8>> {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let mut words: Vec<(Vec<u32>, u64)> =
            chunks.iter().map(|(chunk, count)| (chunk.iter().map(|&b| u32::from(b)).collect(), *count)).collect();
        while tokens.len() < size {
            let mut pairs: HashMap<(u32, u32), u64> = HashMap::new();
            for (word, count) in &words {
                // in "aaa" the pair (a, a) stands twice, though only one can be merged
                word.windows(2).for_each(|two| *pairs.entry((two[0], two[1])).or_default() += count);
            }
            let Some((&pair, _)) = pairs.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
            let new = tokens.len() as u32;
            tokens.push([tokens[pair.0 as usize].as_slice(), &tokens[pair.1 as usize]].concat());
            for (word, _) in &mut words {
                let mut at = 0;
                while at + 1 < word.len() {
                    if (word[at], word[at + 1]) == pair {
                        word.splice(at..at + 2, [new]);
                    }
                    at += 1;
                }
            }
        }
        tokens
    }

    #[test]
    fn equals_the_definition_on_random_chunks() {
        let mut state = 7_u64;
        let mut draw = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for round in 0..300 {
            let letters = 1 + round % 5;
            let chunks: Vec<(Vec<u8>, u64)> = (0..1 + draw(12))
                .map(|_| ((0..1 + draw(30)).map(|_| b'a' + draw(letters) as u8).collect(), 1 + draw(9)))
                .collect();
            let mut distinct: Vec<(&[u8], u64)> = chunks.iter().map(|(c, n)| (c.as_slice(), *n)).collect();
            distinct.sort_unstable();
            distinct.dedup_by_key(|(chunk, _)| *chunk);
            assert_eq!(learn(&distinct, 330), learn_slowly(&distinct, 330), "{distinct:?}");
        }
    }

    #[test]
    fn ties_go_to_the_smaller_pair() {
        let tokens = learn(&[(b"zy", 3), (b"ab", 3), (b"ba", 3)], 258);
        assert_eq!(&tokens[256..], [b"ab", b"ba"]);
    }

    #[test]
    fn counts_have_64_bits() {
        let tokens = learn(&[(b"ab", 1 << 33), (b"cd", (1 << 33) + 1)], 258);
        assert_eq!(&tokens[256..], [b"cd", b"ab"]);
    }

    #[test]
    fn stops_when_nothing_is_left_to_merge() {
        assert_eq!(learn(&[(b"aaaa", 2)], 1000).len(), 258);
        assert_eq!(learn(&[], 1000).len(), 256);
        assert_eq!(learn(&[(b"x", 5)], 1000).len(), 256);
    }

    #[test]
    fn progress_can_stop_it() {
        let mut counts = ChunkCounts::default();
        *counts.entry(b"abcdefgh", 0, 8) += 1;
        let mut merger = Merger::new(&counts).expect("few chunks");
        let outcome = merger.grow(1000, |tokens| if tokens == 259 { Err("stop") } else { Ok(()) });
        assert_eq!(outcome, Err("stop"));
        assert_eq!(merger.into_tokens().len(), 259);
    }
}
