// The scan as XLA's FFI calls it: handlers that fill Scan from XLA's buffers, and copy nothing.
// The build has no headers of jaxlib's. What is used of its C ABI is declared here; that part is the same in versions
// 0.1 (JAX 0.8) to 0.4 (JAX 0.11), and every struct begins with its size.

#include "scan.h"

#include <stddef.h>
#include <string.h>

namespace xla {

enum Type { BOOL = 1, INT32 = 4, FLOAT32 = 11, BFLOAT16 = 16 };
enum Code { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };
enum { METADATA = 1, SCALAR = 3 };

struct Error;

struct Extension {
    size_t size;
    int32_t type;
    Extension *next;
};

struct Version {
    size_t size;
    Extension *extensions;
    int32_t major, minor;
};

struct Metadata {
    size_t size;
    Version version;
    uint32_t traits;
    int64_t state_type;
};

// Stands in the call that XLA makes at registration, to ask for what is then to be filled in.
struct MetadataExtension {
    Extension base;
    Metadata *metadata;
};

struct ErrorArguments {
    size_t size;
    Extension *extensions;
    const char *message;
    int32_t code;
};

struct Api {
    size_t size;
    Extension *extensions;
    Version version;
    const void *internal;
    Error *(*create_error)(ErrorArguments *);
};

struct Buffer {
    size_t size;
    Extension *extensions;
    int32_t type;
    void *data;
    int64_t rank;
    const int64_t *dims;
};

// The arguments or the results.
struct Buffers {
    size_t size;
    Extension *extensions;
    int64_t count;
    const int32_t *kinds;
    const Buffer *const *buffers;
};

struct Name {
    const char *text;
    size_t length;
};

struct Scalar {
    int32_t type;
    const void *value;
};

struct Attributes {
    size_t size;
    Extension *extensions;
    int64_t count;
    const int32_t *kinds;
    const Name *const *names;
    const void *const *values;
};

struct CallFrame {
    size_t size;
    Extension *extensions;
    const Api *api;
    void *context;
    int32_t stage;
    Buffers arguments, results;
    Attributes attributes;
};

}  // namespace xla

using namespace xla;

// Takes the buffers of a call in their order, and notes whether each is what is expected.
struct Reader {
    const Buffers &from;
    const bool enough;
    bool fits = true;
    int64_t next = 0;

    Reader(const Buffers &buffers, int64_t count) : from(buffers), enough(buffers.count == count) {}

    void *take(int32_t type, int64_t count, bool optional = false) {
        if (!enough) return nullptr;
        const Buffer &buffer = *from.buffers[next++];
        int64_t size = 1;
        for (int64_t k = 0; k < buffer.rank; k++) size *= buffer.dims[k];
        if (!size && (optional || !count)) return nullptr;
        fits = fits && size == count && buffer.type == type;
        return buffer.data;
    }
    float *floats(int64_t count, bool optional = false) { return (float *)take(FLOAT32, count, optional); }
    const uint8_t *flags(const Scan &s) { return (const uint8_t *)take(BOOL, s.b * s.l, true); }
    Sequence sequence(const Scan &s, int64_t channels, bool optional = false) {
        void *data = take(s.bfloat16 ? BFLOAT16 : FLOAT32, s.b * s.l * channels, optional);
        return {(char *)data, s.l * channels, channels};
    }
};

static bool read_sizes(const Buffers &arguments, Scan &s) {
    if (arguments.count < 3 || arguments.buffers[0]->rank != 3 || arguments.buffers[2]->rank != 2) return false;
    const Buffer &x = *arguments.buffers[0], &A = *arguments.buffers[2];
    s.b = x.dims[0], s.l = x.dims[1], s.e = x.dims[2], s.n = A.dims[1];
    s.bfloat16 = x.type == BFLOAT16;
    return true;
}

static bool read_attribute(const Attributes &attributes, const char *name, int32_t *value) {
    for (int64_t k = 0; k < attributes.count; k++) {
        const Name &found = *attributes.names[k];
        if (found.length != strlen(name) || memcmp(found.text, name, found.length)) continue;
        const Scalar &scalar = *(const Scalar *)attributes.values[k];
        if (attributes.kinds[k] != SCALAR || scalar.type != INT32) return false;
        memcpy(value, scalar.value, sizeof *value);
        return true;
    }
    return false;
}

static void read_inputs(Reader &arguments, Scan &s) {
    s.x = arguments.sequence(s, s.e);
    s.delta = arguments.sequence(s, s.e);
    s.A = arguments.floats(s.e * s.n);
    s.B = arguments.sequence(s, s.n);
    s.C = arguments.sequence(s, s.n);
    s.D = arguments.floats(s.e, true);
    s.z = arguments.sequence(s, s.e, true);
    s.delta_bias = arguments.floats(s.e, true);
    s.initial_state = arguments.floats(s.b * s.e * s.n);
    s.mask = arguments.flags(s);
    s.restart = arguments.flags(s);
}

static bool read_forward(const CallFrame &frame, Scan &s) {
    Reader arguments(frame.arguments, 11), results(frame.results, 3);
    read_inputs(arguments, s);
    s.y = results.sequence(s, s.e);
    s.final_state = results.floats(s.b * s.e * s.n);
    s.boundaries = results.floats(mamba_scan_boundaries(s.b, s.l, s.e, s.n), true);
    return arguments.enough && arguments.fits && results.enough && results.fits;
}

// The gradients have the order of the inputs, and no elements where those have none.
static bool read_backward(const CallFrame &frame, Scan &s) {
    Reader arguments(frame.arguments, 14), results(frame.results, 9);
    read_inputs(arguments, s);
    s.boundaries = arguments.floats(mamba_scan_boundaries(s.b, s.l, s.e, s.n));
    s.dy = arguments.sequence(s, s.e);
    s.dfinal_state = arguments.floats(s.b * s.e * s.n);
    s.dx = results.sequence(s, s.e);
    s.ddelta = results.sequence(s, s.e);
    s.dA = results.floats(s.e * s.n);
    s.dB = results.sequence(s, s.n);
    s.dC = results.sequence(s, s.n);
    s.dD = results.floats(s.D ? s.e : 0);
    s.dz = results.sequence(s, s.z.data ? s.e : 0);
    s.ddelta_bias = results.floats(s.delta_bias ? s.e : 0);
    s.dinitial_state = results.floats(s.b * s.e * s.n);
    return arguments.enough && arguments.fits && results.enough && results.fits;
}

static Error *error(const CallFrame &frame, int32_t code, const char *message) {
    ErrorArguments arguments = {sizeof arguments, nullptr, message, code};
    return frame.api->create_error(&arguments);
}

static Error *call(CallFrame &frame, bool read(const CallFrame &, Scan &), int32_t run(const Scan *)) {
    if (frame.extensions && frame.extensions->type == METADATA) {
        Metadata &metadata = *((MetadataExtension *)frame.extensions)->metadata;
        metadata.version.major = 0;
        metadata.version.minor = 1;
        return nullptr;
    }
    Scan s = {};
    if (!read_attribute(frame.attributes, "delta_softplus", &s.delta_softplus) ||
        !read_attribute(frame.attributes, "threads", &s.threads) || !read_sizes(frame.arguments, s) || !read(frame, s))
        return error(frame, INVALID_ARGUMENT, "the native scan was called with other arguments than it takes");
    return run(&s) ? error(frame, RESOURCE_EXHAUSTED, "no memory for the workspace of the native scan") : nullptr;
}

// Handlers of XLA's typed FFI. Arguments: x, delta, A, B, C, D, z, delta_bias, initial_state, mask and restart, those
// that are absent without elements; attributes: delta_softplus and threads, int32.

// Results: y, final_state, boundaries, which may be without elements.
EXPORT Error *mamba_scan_forward_xla(CallFrame *frame) { return call(*frame, read_forward, mamba_scan_forward); }

// Further arguments: boundaries, dy, dfinal_state. Results: a gradient for each argument to initial_state.
EXPORT Error *mamba_scan_backward_xla(CallFrame *frame) { return call(*frame, read_backward, mamba_scan_backward); }
