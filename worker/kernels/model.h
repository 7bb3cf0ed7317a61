// A model: a checked shape, its scratch memory, and the check of every step before it touches memory.
#pragma once
#include <memory>
#include <vector>

#include "state.h"

struct llk_model {
  llk_shape shape;
  std::vector<llk_layer> layers;
  const Kernels* kernels;
  State state{};
  std::vector<std::shared_ptr<void>> memory;
  std::vector<ThreadScratch> scratch;
  std::vector<RowGroup> groups;
  std::vector<int32_t> lowering;
  std::vector<LoweringUnit> lowering_units;
};

llk_status check_shape(const llk_shape& shape);
llk_status check_step(const llk_shape& shape, const llk_step_args& args);
// Scratch for all rows. False if memory is short.
bool reserve(llk_model& model);
// Scratch of each thread, row groups and progress of a step that has been checked. False if memory is short.
bool prepare(llk_model& model, const llk_step_args& args, int threads);
