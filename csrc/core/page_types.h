// Types of pages in one table: the working pages, whose elements are those of the queries, and pools of quantized pages
// (core/page_blob.h). The upper four bits of a table entry are the page's type: 0 is a working page, i the i-th pool
// that the operator was given, whatever formats that has.
#pragma once

#include "core/kvquant.h"
#include "core/pages.h"

namespace tokencomp {

constexpr int kMaxPageTypes = 7;  // entries stay non-negative, and kNoPage is none of them

// One of the keys and the values of a page.
struct PageHalf {
  kvquant::Format format;
  int codes = 0, params = 0;  // bytes from the beginning of the page
};

struct PagePool {
  const uint8_t* base = nullptr;
  int64_t page_bytes = 0;
  int pages = 0;
  PageHalf k, v;
};

// Every quantized page of (b, kv) holds y = (x - bias) * scale of its channels; null: 0 and 1.
struct PageMaps {
  const float *k_scale = nullptr, *k_bias = nullptr;  // [B, Hkv, D]
  const float *v_scale = nullptr, *v_bias = nullptr;
};

struct PageTypes {
  PagePool pool[kMaxPageTypes];
  int count = 0;
  PageMaps maps;

  // The type of an entry, -1 where it names no page there is; `working` pages are in the working pool.
  TC_HD int type_of(int32_t entry, int working) const {
    if (entry < 0) return -1;
    const int type = page_type(entry), number = page_number(entry);
    if (type > count) return -1;
    return number < (type ? pool[type - 1].pages : working) ? type : -1;
  }
  TC_HD const PagePool& pool_of(int type) const { return pool[type - 1]; }
  TC_HD const uint8_t* page(int32_t entry) const {
    const PagePool& p = pool_of(page_type(entry));
    return p.base + page_number(entry) * p.page_bytes;
  }
};

}  // namespace tokencomp
