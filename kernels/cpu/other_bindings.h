// What bindings.cpp adds to the module out of other files.
#pragma once

#include "binding_arrays.h"

namespace fastslots {

void bind_slot_attention(nb::module_& m);
void bind_steps(nb::module_& m);  // TrainStep_float32 and the others of a training step

}  // namespace fastslots
