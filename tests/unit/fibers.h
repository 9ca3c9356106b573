// A GPU's block of threads on a CPU: every thread is a fiber, and the fibers take turns at barriers and shuffles.

#include <ucontext.h>

#include <functional>
#include <vector>

namespace fibers {

struct Index {
  int x;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done = false;
};

// The block that runs: its number, its fibers, which of them, and what each last offered to a shuffle.
struct Block {
  int number, current;
  std::vector<Fiber> fibers;
  std::vector<float> offered;
  std::function<void()> body;
  ucontext_t scheduler;
};
static Block block;

// All go on from here together: each is let run up to it before any goes on.
inline void barrier() { swapcontext(&block.fibers[block.current].context, &block.scheduler); }

inline float shuffle_xor(float value, int mask) {
  int self = block.current;
  block.offered[self] = value;
  barrier();
  float received = block.offered[self ^ mask];
  barrier();
  return received;
}

inline void enter() {
  block.body();
  block.fibers[block.current].done = true;
  barrier();
}

inline void run_block(int threads, std::function<void()> body) {
  block.fibers.resize(threads), block.offered.resize(threads), block.body = body;
  for (Fiber& fiber : block.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool going = true; going;) {
    going = false;
    for (block.current = 0; block.current < threads; ++block.current)
      if (!block.fibers[block.current].done) {
        going = true;
        swapcontext(&block.scheduler, &block.fibers[block.current].context);
      }
  }
}

}  // namespace fibers
