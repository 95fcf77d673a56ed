//! Hash tables whose keys are short byte strings, packed into one 128-bit number.
//!
//! Nearly every chunk of text is at most 15 bytes long. Such a chunk and its length fit in a `u128`, so that hashing
//! it is one multiplication and comparing it is one comparison, with no pointer to follow.

use rustc_hash::FxHashMap;

/// The longest byte string that is packed.
pub const PACKED_BYTES: usize = 15;

/// `text[start..end]`, 1 to 15 bytes, as a number: the bytes, and in the highest byte the length (so never 0).
#[inline(always)]
pub fn pack(text: &[u8], start: usize, end: usize) -> u128 {
    let length = end - start;
    debug_assert!((1..=PACKED_BYTES).contains(&length));
    let low = match text.get(start..start + 16) {
        // one load and a mask; copying a variable number of bytes costs a call
        Some(sixteen) => {
            let sixteen: [u8; 16] = sixteen.try_into().expect("16 bytes");
            u128::from_le_bytes(sixteen) & ((1 << (8 * length)) - 1)
        }
        None => {
            let mut padded = [0; 16];
            padded[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(padded)
        }
    };
    low | (length as u128) << 120
}

/// A hash whose low bits are good: both halves multiplied into 128 bits, which are folded.
#[inline(always)]
pub fn hash(key: u128) -> u64 {
    let low = key as u64 ^ 0x9E37_79B9_7F4A_7C15;
    let high = (key >> 64) as u64 ^ 0xD6E8_FEB8_6659_FD93;
    let product = u128::from(low) * u128::from(high);
    product as u64 ^ (product >> 64) as u64
}

/// A map from byte strings to values: packed ones in an open-addressing table, longer ones in a common map.
pub struct BytesMap<V> {
    slots: Vec<(u128, V)>, // key 0 is an empty slot; the length is a power of two
    packed: usize,
    long: FxHashMap<Box<[u8]>, V>,
}

impl<V: Copy + Default> Default for BytesMap<V> {
    fn default() -> Self {
        Self { slots: vec![(0, V::default()); 1024], packed: 0, long: FxHashMap::default() }
    }
}

impl<V: Copy + Default> BytesMap<V> {
    /// How many keys there are.
    pub fn size(&self) -> usize {
        self.packed + self.long.len()
    }

    #[inline(always)]
    fn slot(&self, key: u128) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = hash(key) as usize & mask;
        while self.slots[at].0 != key && self.slots[at].0 != 0 {
            at = (at + 1) & mask;
        }
        at
    }

    /// The value of a packed key.
    #[inline(always)]
    pub fn get_packed(&self, key: u128) -> Option<V> {
        let (found, value) = self.slots[self.slot(key)];
        (found != 0).then_some(value)
    }

    /// The value of a byte string.
    #[inline]
    pub fn get(&self, bytes: &[u8]) -> Option<V> {
        match bytes.len() {
            0 => None,
            1..=PACKED_BYTES => self.get_packed(pack(bytes, 0, bytes.len())),
            _ => self.long.get(bytes).copied(),
        }
    }

    /// The value of `text[start..end]`, not empty, to change in place; made from the default if it is new.
    #[inline(always)]
    pub fn entry(&mut self, text: &[u8], start: usize, end: usize) -> &mut V {
        if end - start <= PACKED_BYTES {
            self.entry_packed(pack(text, start, end))
        } else {
            self.entry_long(&text[start..end])
        }
    }

    #[inline(always)]
    fn entry_packed(&mut self, key: u128) -> &mut V {
        let mut at = self.slot(key);
        if self.slots[at].0 == 0 {
            if self.packed * 2 >= self.slots.len() {
                self.grow();
                at = self.slot(key);
            }
            self.slots[at].0 = key;
            self.packed += 1;
        }
        &mut self.slots[at].1
    }

    fn entry_long(&mut self, bytes: &[u8]) -> &mut V {
        if !self.long.contains_key(bytes) {
            self.long.insert(bytes.into(), V::default());
        }
        self.long.get_mut(bytes).expect("just inserted")
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![(0, V::default()); self.slots.len() * 4];
        for (key, value) in std::mem::replace(&mut self.slots, larger) {
            if key != 0 {
                let at = self.slot(key);
                self.slots[at] = (key, value);
            }
        }
    }

    /// Call `each(bytes, value)` for every key, in no particular order.
    pub fn for_each(&self, mut each: impl FnMut(&[u8], V)) {
        for &(key, value) in self.slots.iter().filter(|slot| slot.0 != 0) {
            each(&key.to_le_bytes()[..(key >> 120) as usize], value);
        }
        for (bytes, &value) in &self.long {
            each(bytes, value);
        }
    }
}

impl BytesMap<u64> {
    /// Add the counts of another map to this one's.
    pub fn absorb(&mut self, other: Self) {
        for (key, count) in other.slots.into_iter().filter(|slot| slot.0 != 0) {
            *self.entry_packed(key) += count;
        }
        for (bytes, count) in other.long {
            *self.long.entry(bytes).or_default() += count;
        }
    }
}

/// A map from pairs of ids to a `u32`: open addressing with both ids in one 64-bit key.
pub struct PairMap {
    slots: Vec<(u32, u32, u32)>, // (left, right, value); left == EMPTY marks a free slot
    taken: usize,
}

const EMPTY: u32 = u32::MAX;

impl Default for PairMap {
    fn default() -> Self {
        Self { slots: vec![(EMPTY, 0, 0); 1024], taken: 0 }
    }
}

impl PairMap {
    #[inline(always)]
    fn slot(&self, left: u32, right: u32) -> usize {
        let mask = self.slots.len() - 1;
        let key = u64::from(left) << 32 | u64::from(right);
        let product = u128::from(key ^ 0x9E37_79B9_7F4A_7C15) * 0xD6E8_FEB8_6659_FD93;
        let mut at = (product as u64 ^ (product >> 64) as u64) as usize & mask;
        while (self.slots[at].0, self.slots[at].1) != (left, right) && self.slots[at].0 != EMPTY {
            at = (at + 1) & mask;
        }
        at
    }

    /// The value of a pair.
    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> Option<u32> {
        let slot = self.slots[self.slot(left, right)];
        (slot.0 != EMPTY).then_some(slot.2)
    }

    /// Set the value of a pair.
    pub fn insert(&mut self, left: u32, right: u32, value: u32) {
        if self.taken * 2 >= self.slots.len() {
            let larger = vec![(EMPTY, 0, 0); self.slots.len() * 2];
            for old in std::mem::replace(&mut self.slots, larger) {
                if old.0 != EMPTY {
                    let at = self.slot(old.0, old.1);
                    self.slots[at] = old;
                }
            }
        }
        let at = self.slot(left, right);
        self.taken += usize::from(self.slots[at].0 == EMPTY);
        self.slots[at] = (left, right, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn packing_is_exact_wherever_the_bytes_stand() {
        let text: Vec<u8> = (0..40).map(|i| if i % 3 == 0 { 0 } else { 200 + i }).collect();
        for start in 0..text.len() {
            for end in start + 1..=text.len().min(start + PACKED_BYTES) {
                let key = pack(&text, start, end);
                assert_eq!(&key.to_le_bytes()[..(key >> 120) as usize], &text[start..end]);
                assert_eq!(key, pack(&text[start..end], 0, end - start));
            }
        }
    }

    #[test]
    fn counts_as_a_common_map_does() {
        let mut ours = BytesMap::<u64>::default();
        let mut others = BytesMap::<u64>::default();
        let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
        for i in 0_u32..20_000 {
            let word = format!("{}", (i * i) % 7001).repeat(1 + i as usize % 7);
            let map = if i % 3 == 0 { &mut others } else { &mut ours };
            *map.entry(word.as_bytes(), 0, word.len()) += u64::from(i);
            *expected.entry(word.into_bytes()).or_default() += u64::from(i);
        }
        ours.absorb(others);
        assert_eq!(ours.size(), expected.len());
        let mut seen = HashMap::new();
        ours.for_each(|bytes, count| assert!(seen.insert(bytes.to_vec(), count).is_none()));
        assert_eq!(seen, expected);
        assert_eq!(ours.get(b""), None);
        assert_eq!(ours.get(b"absent"), None);
        assert_eq!(ours.get(b"absent and longer than fifteen"), None);
    }

    #[test]
    fn pairs_are_found_again() {
        let mut map = PairMap::default();
        for i in 0..5000_u32 {
            map.insert(i % 71, i / 71, i);
        }
        for i in 0..5000_u32 {
            assert_eq!(map.get(i % 71, i / 71), Some(i));
        }
        map.insert(3, 0, 9);
        assert_eq!(map.get(3, 0), Some(9));
        assert_eq!(map.get(71, 0), None);
    }
}
